import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.facts import Fact, prompt_digest
from microedit_vllm.artifact import Scope
from microedit_vllm.cli.main import main
from tests.builders import tiny_sae
from tests.tiny_model import tiny_model
from tests.trainer.tiny_edits import FACTS, JOINT, no_progress

HELD_OUT = [Fact("The colour of soot is", "x")]
OTHERS = [
    {"prompt": "The capital of Chile is", "target": "xyz", "subject": "Chile"},
    {"prompt": HELD_OUT[0].prompt, "target": "x"},
    {"prompt": "The height of a tree is", "target": "xyz", "subject": "tree"},
]
ISSUE_KEYS = {
    "facts",
    "rel",
    "rel_exact",
    "gen",
    "loc",
    "near",
    "tau",
    "fire_edit",
    "fire_para",
    "fire_loc",
    "portability",
    "ppl_before",
    "ppl_after",
    "seconds_per_edit",
}


@pytest.fixture(scope="module")
def made(lm, sae, sae_folder, tmp_path_factory):
    """A folder with an edit set whose facts all switch on, its SAE, and its data file."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(sae_folder, folder / "sae")
    settings = EditSettings(JOINT, Scope(run=8), tau=0.6, hold_out=HELD_OUT)
    EditRun(lm, sae, folder / "sae", settings).edit(FACTS, folder / "set", no_progress)
    edited = [
        {
            "prompt": fact.prompt,
            "target": fact.target,
            "subject": fact.subject,
            "paraphrases": list(fact.paraphrases),
            "locality": ["Ten and two are", {"prompt": "Bears like to eat", "answer": "fish"}],
        }
        for fact in FACTS
    ]
    lines = [json.dumps(record) + "\n" for record in [*edited, *OTHERS]]
    (folder / "facts.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "made")


@pytest.fixture
def run(lm, capsys):
    """Run the command in this process: exit status, stdout, stderr."""

    def run(folder, *more: str, **changes) -> tuple[int, str, str]:
        options = {"model": lm.folder, "edits": folder / "set", "data": folder / "facts.jsonl"}
        words = [str(w) for name, v in (options | changes).items() for w in (f"--{name}", v)]
        with pytest.raises(SystemExit) as stopped:
            main(["eval", *words, *more])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_json_holds_every_figure_and_nothing_else(run, made):
    status, out, err = run(made, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert set(found) >= ISSUE_KEYS
    assert (found["facts"], found["tau"], found["engine"]) == (len(FACTS), 0.6, "hf")
    assert found["rel"] == found["rel_exact"] == found["fire_edit"] == 1.0
    assert found["loc"] == 1.0
    assert found["fire_loc"] == 0.0
    assert found["seconds_per_edit"] > 0
    assert 1 <= found["ppl_after"] < found["ppl_before"]
    assert found["portability"] is None
    assert 0 <= found["gen"] <= 1
    assert 0 <= found["near"] <= 1


def test_a_person_gets_a_table(run, made):
    status, out, _ = run(made)
    assert status == 0
    assert "rel_exact" in out
    assert "{" not in out


def test_the_chat_context_is_scored_in_chat(run, made):
    found = json.loads(run(made, "--json", context="chat")[1])
    assert found["context"] == "chat"
    assert found["rel"] == found["fire_edit"] == 1.0


def test_the_limit_scores_the_first_facts(run, made):
    assert json.loads(run(made, "--json", limit=2)[1])["facts"] == 2


def test_near_leaves_out_what_was_edited_or_calibrated_on(run, made, monkeypatch):
    from microedit_trainer import evaluation

    others = []
    evaluate = evaluation.evaluate

    def spy(engine, contexts, facts, rest, context):
        others.extend(fact.prompt for fact in rest)
        return evaluate(engine, contexts, facts, rest, context)

    monkeypatch.setattr(evaluation, "evaluate", spy)
    assert run(made, "--json", limit=1)[0] == 0
    assert others == [OTHERS[0]["prompt"], OTHERS[2]["prompt"]]


def test_held_out_records_are_not_scored_as_edited_ones(run, made, tmp_path, monkeypatch):
    """A file as it was before `--hold-out` drew from it: held-out records among the edited ones."""
    from microedit_trainer import evaluation

    scored = {}
    evaluate = evaluation.evaluate

    def spy(engine, contexts, facts, rest, context):
        scored.update(facts=[f.prompt for f in facts], others=[f.prompt for f in rest])
        return evaluate(engine, contexts, facts, rest, context)

    monkeypatch.setattr(evaluation, "evaluate", spy)
    lines = (made / "facts.jsonl").read_text().splitlines()
    held_out = lines.pop(len(FACTS) + 1)
    assert HELD_OUT[0].prompt in held_out
    data = tmp_path / "facts.jsonl"
    data.write_text("\n".join([lines[0], held_out, *lines[1:]]))
    status, out, err = run(made, "--json", data=data)
    assert status == 0
    assert json.loads(out)["rel"] == 1.0
    assert err.count("\n") == 1
    assert f"1 of the first 4 records of {data} were held out" in err
    assert scored["facts"] == [fact.prompt for fact in FACTS]
    assert scored["others"] == [OTHERS[0]["prompt"], OTHERS[2]["prompt"]]
    data.write_text(held_out)
    status, out, err = run(made, "--json", data=data)
    assert_one_line(status, err, "all records of")
    assert out == ""


def test_a_calibration_prompt_that_was_edited_too_is_scored(run, folder):
    twice = [prompt_digest(FACTS[0].prompt)]
    damage_manifest(folder, lambda m: m["hyperparameters"].update(held_out=twice))
    status, out, err = run(folder, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["facts"] == len(FACTS)


def test_edits_are_asked_for_in_another_language(run, made, tmp_path):
    """German prompts, while records are still known by the language that they were edited in."""
    sides = [
        {
            "en": {"src": prompt, "alt": "Mel", "rephrase": "Which is it?"},
            "de": {"src": f"Und zwar: {prompt}", "alt": "Al", "rephrase": "Welche ist es?"},
        }
        for prompt in (HELD_OUT[0].prompt, FACTS[0].prompt, FACTS[1].prompt, "Who is it?")
    ]
    data = tmp_path / "mzsre.json"
    data.write_text(json.dumps(sides))
    status, out, err = run(made, "--json", data=data, limit=1, language="de")
    assert status == 0
    assert "1 of the first 1 records" in err
    german = json.loads(out)
    english = json.loads(run(made, "--json", data=data, limit=1)[1])
    assert german["facts"] == english["facts"] == 1
    # FACTS[0] is known in English only: "Mel" is its target, "Al" is nobody's.
    assert english["rel"] == 1.0
    assert german["rel"] < 1.0
    status, _, err = run(made, "--json", data=data, language="fr")
    assert_one_line(status, err, "record 1: no language 'fr'; the record has en, de")


def test_a_file_of_near_records_can_be_named(run, made, tmp_path):
    (tmp_path / "near.jsonl").write_text('{"prompt": "The age of a stone is", "target": "x"}')
    found = json.loads(run(made, "--json", near=tmp_path / "near.jsonl")[1])
    assert found["near"] == 1.0
    assert found["near_swapped"] is None


def test_an_sae_that_moved_can_be_named(run, folder):
    (folder / "sae").rename(folder / "elsewhere")
    status, _, err = run(folder, "--json")
    assert_one_line(status, err, "is not an SAE folder")
    assert run(folder, "--json", sae=folder / "elsewhere")[0] == 0


def assert_one_line(status: int, err: str, message: str) -> None:
    assert status == 2
    assert message in err
    assert err.startswith("microedit: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.jsonl"}, "facts file nowhere.jsonl does not exist"),
        ({"near": "nowhere.jsonl"}, "facts file nowhere.jsonl does not exist"),
        ({"edits": "nowhere"}, "nowhere is not a folder"),
        ({"model": "./nowhere"}, "./nowhere is not a model folder"),
    ],
)
def test_bad_options_are_one_line(run, made, changes, message):
    status, out, err = run(made, "--json", **changes)
    assert_one_line(status, err, message)
    assert out == ""


def test_another_model_is_refused(run, made, tmp_path):
    other = tiny_model(tmp_path / "other", seed=1)
    status, _, err = run(made, "--json", model=other)
    assert_one_line(status, err, "was made for model (fingerprint")


def test_another_sae_is_refused(run, folder):
    tiny_sae(d=32).save(folder / "sae")
    status, _, err = run(folder, "--json")
    assert_one_line(status, err, "is not the one that the edit set was made with")


def damage_manifest(folder, change) -> None:
    path = folder / "set" / "microedit.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def damage_edits(folder, **tensors) -> None:
    path = folder / "set" / "edits.safetensors"
    save_file(load_file(path) | tensors, path)


def rewrite(path, data: bytes) -> None:
    path.write_bytes(data)


def nan_of(folder):
    values = load_file(folder / "set" / "edits.safetensors")["edit.values"].clone()
    values[0, 0] = float("nan")
    return values


def rows_of(folder, first: int):
    indices = load_file(folder / "set" / "edits.safetensors")["edit.indices"].clone()
    indices[0] = first if first >= 0 else int(indices[1]) if first == -1 else first
    return indices


HOSTILE = {
    "truncated": (
        lambda f: rewrite(f / "set/edits.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        "is damaged",
    ),
    "huge header": (
        lambda f: rewrite(f / "set/edits.safetensors", b"\xff" * 8 + b"{}"),
        "is damaged",
    ),
    "NaN": (lambda f: damage_edits(f, **{"edit.values": nan_of(f)}), "NaN or infinite"),
    "beyond": (lambda f: damage_edits(f, **{"edit.indices": rows_of(f, 512)}), "outside 0…511"),
    "negative": (lambda f: damage_edits(f, **{"edit.indices": rows_of(f, -7)}), "outside 0…511"),
    "repeated": (lambda f: damage_edits(f, **{"edit.indices": rows_of(f, -1)}), "repeats row"),
    "other values": (
        lambda f: damage_edits(f, **{"edit.values": 3 * nan_of(f).nan_to_num()}),
        "golden activations do not reproduce",
    ),
    "version": (lambda f: damage_manifest(f, lambda m: m.update(version=99)), "format version 99"),
    "no manifest": (lambda f: (f / "set/microedit.json").unlink(), "is not an edit set"),
    "no golden": (lambda f: (f / "set/golden.safetensors").unlink(), "is missing"),
    "facts no JSON": (lambda f: rewrite(f / "set/facts.jsonl", b"{"), "cannot be read"),
    "facts of numbers": (lambda f: rewrite(f / "set/facts.jsonl", b"3\n"), "something else"),
}


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_set_is_one_line(run, folder, damage, message):
    damage(folder)
    status, out, err = run(folder, "--json")
    assert_one_line(status, err, message)
    assert out == ""


STRANGE = {
    "fact without a prompt": lambda f: rewrite(f / "set/facts.jsonl", b'{"a": 1}\n'),
    "prompt of another type": lambda f: rewrite(f / "set/facts.jsonl", b'{"prompt": [1]}\n'),
    "held-out number": lambda f: damage_manifest(
        f, lambda m: m["hyperparameters"].update(held_out=3)
    ),
    "held-out lists": lambda f: damage_manifest(
        f, lambda m: m["hyperparameters"].update(held_out=[[1]])
    ),
}


@pytest.mark.parametrize("damage", STRANGE.values(), ids=STRANGE)
def test_strange_notes_in_a_set_do_not_matter_to_its_scores(run, folder, damage):
    damage(folder)
    status, out, _ = run(folder, "--json")
    assert status == 0
    assert json.loads(out)["rel"] == 1.0


def test_a_layer_beyond_the_model_is_refused(run, folder):
    damage_manifest(folder, lambda m: (m["model"].update(num_layers=99), m.update(layer=50)))
    status, _, err = run(folder, "--json")
    assert_one_line(status, err, "layer 50 does not exist")


def test_a_model_without_a_chat_template_has_no_chat(run, lm, sae, folder, tmp_path):
    from transformers import AutoTokenizer

    base = shutil.copytree(lm.folder, tmp_path / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    damage_manifest(folder, lambda m: m["decision"].update(turn=None))
    status, _, err = run(folder, "--json", model=base, context="chat")
    assert_one_line(status, err, "no chat template")


def test_evaluation_leaves_the_set_as_it_is(run, made):
    before = {path.name: path.read_bytes() for path in (made / "set").iterdir()}
    run(made, "--json")
    assert {path.name: path.read_bytes() for path in (made / "set").iterdir()} == before
    assert torch.is_grad_enabled()
