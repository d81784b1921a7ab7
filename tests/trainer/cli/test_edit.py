import json
import subprocess
import sys

import pytest

from microedit_trainer.edit_run import EditRun
from microedit_trainer.facts import prompt_digest
from microedit_trainer.solvers import InProcess, Processes, RayCluster
from microedit_vllm.artifact import EditSet, SparseAutoencoder
from microedit_vllm.cli.main import main
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_sae
from tests.tiny_model import tiny_model
from tests.trainer.tiny_edits import FACTS


def lines_of(*facts) -> str:
    records = [
        {"prompt": f.prompt, "target": f.target, "subject": f.subject} for f in facts or FACTS
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def options(lm, sae_folder, tmp_path):
    (tmp_path / "facts.jsonl").write_text(lines_of())
    return {
        "--model": str(lm.folder),
        "--sae": str(sae_folder),
        "--data": str(tmp_path / "facts.jsonl"),
        "--out": str(tmp_path / "set"),
    }


@pytest.fixture
def edit(options, capsys):
    """Run the command in this process: exit status, stdout, stderr."""

    def edit(changes: dict[str, str]) -> tuple[int, str, str]:
        words = [word for pair in (options | changes).items() for word in pair]
        with pytest.raises(SystemExit) as stopped:
            main(["edit", *words])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return edit


SEQUENTIAL = {"--solver": "sequential", "--steps-rec": "2", "--steps-edit": "2"}
PAPERS = SEQUENTIAL | {"--passes": "1", "--statistic": "absolute"}


@pytest.mark.parametrize(
    "changes", [{}, SEQUENTIAL, PAPERS], ids=["joint", "sequential", "the paper's"]
)
def test_the_command_writes_a_set_and_shows_it(edit, tmp_path, sae, changes):
    status, out, _ = edit(changes)
    assert status == 0
    assert "seconds per edit" in out
    assert "tau" in out
    manifest = EditSet.load(tmp_path / "set").manifest
    assert manifest.solver == changes.get("--solver", "joint")
    assert manifest.facts == len(FACTS)
    if changes:
        assert manifest.hyperparameters["alpha"] == sae.report["mean_distance"]
        is_papers = manifest.decision.statistic == "absolute"
        assert is_papers == ("--passes" in changes)
        assert str(manifest.decision.scope) == "all"
        assert manifest.hyperparameters["rows_per_fact"] == 40
    else:
        assert str(manifest.decision.scope) == "window:16 in last:64"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl", "set"]


def test_options_reach_the_solver(edit, tmp_path):
    assert edit({"--limit": "2", "--rows-per-fact": "7", "--tau": "0.25"})[0] == 0
    manifest = EditSet.load(tmp_path / "set").manifest
    assert manifest.facts == 2
    assert manifest.hyperparameters["rows_per_fact"] == 7
    assert manifest.decision.tau == 0.25
    changes = {"--alpha": "99", "--lr": "0.01", "--position": "sequence"}
    assert edit(PAPERS | changes)[0] == 0
    manifest = EditSet.load(tmp_path / "set").manifest
    assert (manifest.decision.alpha, manifest.position) == (99.0, "sequence")
    assert manifest.hyperparameters["lr"] == 0.01


@pytest.mark.parametrize("solver", [{}, SEQUENTIAL], ids=["joint", "sequential"])
def test_no_rows_a_fact_are_all_rows(edit, tmp_path, sae, solver):
    assert edit(solver | {"--limit": "1", "--rows-per-fact": "0"})[0] == 0
    found = EditSet.load(tmp_path / "set").manifest.hyperparameters["rows_per_fact"]
    assert found == (None if solver else sae.num_latents)


@pytest.mark.parametrize(
    ("words", "executor"),
    [
        ([], InProcess),
        (["--workers", "1"], InProcess),
        (["--workers", "3"], lambda: Processes(3)),
        (["--ray"], lambda: RayCluster(None)),
        (["--ray", "--workers", "5"], lambda: RayCluster(5)),
    ],
)
def test_the_executor_is_the_one_asked_for(options, monkeypatch, words, executor):
    given = []

    def build(self, lm, sae, sae_folder, settings):
        given.append(settings.executor)
        raise MicroEditError("seen")

    monkeypatch.setattr(EditRun, "__init__", build)
    options = [word for pair in options.items() for word in pair]
    with pytest.raises(SystemExit):
        main(["edit", *options, *words])
    (found,) = given
    assert type(found) is type(executor())
    assert vars(found) == vars(executor())


@pytest.mark.parametrize("words", [{"--workers": "2"}, {"--ray": "--tau=0.5"}])
def test_the_sequential_solver_has_nothing_to_spread(edit, tmp_path, words):
    status, _, err = edit(SEQUENTIAL | words)
    assert_one_line(status, err, "one fact after another; leave --workers and --ray out")
    assert not (tmp_path / "set").exists()


def test_contradictions_are_shown(edit, tmp_path):
    (tmp_path / "facts.jsonl").write_text(lines_of(FACTS[0], FACTS[1], FACTS[0]))
    _, out, _ = edit({})
    assert "repeats fact 3" in out
    assert "repeats fact 1" in out


def test_one_file_is_split_and_the_set_remembers_how(edit, tmp_path):
    status, out, _ = edit({"--hold-out": "1", "--hold-out-seed": "5"})
    assert status == 0
    assert "1 of the 4 records" in out
    assert "(seed 5)" in out
    edit_set = EditSet.load(tmp_path / "set")
    edited = {line["prompt"] for line in edit_set.facts}
    (left,) = [fact for fact in FACTS if fact.prompt not in edited]
    assert edit_set.manifest.facts == len(edited) == 3
    assert edit_set.manifest.hyperparameters["held_out"] == [prompt_digest(left.prompt)]
    assert edit_set.manifest.scores["calibration"]["prompts"]["held_out"] == 2  # bare and in chat


def test_facts_in_several_languages_are_edited_in_one(edit, tmp_path):
    sides = {
        "en": {"src": FACTS[0].prompt, "alt": "Mel"},
        "de": {"src": "Wer war es denn?", "alt": "Al"},
    }
    (tmp_path / "facts.jsonl").write_text(json.dumps(sides))
    assert edit({"--language": "de"})[0] == 0
    edit_set = EditSet.load(tmp_path / "set")
    assert [line["prompt"] for line in edit_set.facts] == ["Wer war es denn?"]
    assert edit_set.manifest.hyperparameters["language"] == "de"


def test_prompts_that_look_like_markup_are_shown_as_they_are(edit, tmp_path):
    prompt = "Who closed the [/tag] in [bold]Narnia[/bold]?"
    record = json.dumps({"prompt": prompt, "target": "x"})
    (tmp_path / "facts.jsonl").write_text(f"{record}\n{record}\n")
    status, out, err = edit({})
    assert (status, err) == (0, "")
    assert "[/tag]" in out


BAD_FACTS = {
    "": "holds no facts",
    "no json": "line 5: not JSON",
    '{"prompt": "Who is it then?", "target": " "}': "line 5: the target is empty",
    '{"prompt": "", "target": "x"}': "line 5: the prompt is empty",
    '{"prompt": "Who is it then?"}': "line 5: needs the fields",
    '{"prompt": "Who is it then?", "target": ["x"]}': "line 5: 'target' must be a string",
    json.dumps({"prompt": "who " * 200, "target": "x"}): "model's context of 512",
    '{"prompt": "?", "target": "x"}': "fact 5: the prompt '?' is too short",
}


def assert_one_line(status: int, err: str, message: str) -> None:
    assert status == 2
    assert message in err
    assert err.startswith("microedit: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("line", "message"), BAD_FACTS.items())
def test_bad_facts_are_one_line_and_leave_nothing(edit, tmp_path, line, message):
    (tmp_path / "facts.jsonl").write_text(lines_of() * bool(line) + line)
    status, _, err = edit({})
    assert_one_line(status, err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["facts.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data": "nowhere.jsonl"}, "facts file nowhere.jsonl does not exist"),
        ({"--hold-out": "nowhere.jsonl"}, "facts file nowhere.jsonl does not exist"),
        ({"--hold-out": "4"}, "leaves nothing to edit"),
        ({"--hold-out": "1.5"}, "--hold-out 1.5: name a number"),
        ({"--sae": "nowhere"}, "nowhere is not an SAE folder"),
        ({"--model": "./nowhere"}, "./nowhere is not a model folder"),
        ({"--layer": "3"}, "layer 3 does not exist"),
        ({"--layer": "-1"}, "layer -1 does not exist"),
        ({"--tau": "0"}, "tau is 0.0"),
        ({"--tau": "inf"}, "tau is inf"),
        (SEQUENTIAL | {"--alpha": "-1"}, "alpha is -1.0"),
        (SEQUENTIAL | {"--alpha": "nan"}, "alpha is nan"),
        (SEQUENTIAL | {"--alpha": "0"}, "alpha is 0.0"),
        (SEQUENTIAL | {"--lr": "-1"}, "lr is -1.0"),
        (SEQUENTIAL | {"--lr": "inf"}, "lr is inf"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(edit, tmp_path, changes, message):
    status, _, err = edit(changes)
    assert_one_line(status, err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["facts.jsonl"]


def test_an_sae_of_another_width_is_refused(edit, tmp_path):
    SparseAutoencoder.save(tiny_sae(d=24), tmp_path / "sae")
    status, _, err = edit({"--sae": str(tmp_path / "sae"), "--layer": "1"})
    assert_one_line(status, err, "residuals of width 24")
    assert not (tmp_path / "set").exists()


def test_an_sae_without_a_report_needs_layer_and_alpha(edit, sae, tmp_path):
    bare = SparseAutoencoder(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
    bare.save(tmp_path / "sae")
    there = {"--sae": str(tmp_path / "sae")}
    assert_one_line(*_without_output(edit(there)), "name it with --layer")
    assert_one_line(*_without_output(edit(SEQUENTIAL | there)), "give --alpha")
    assert edit(there | {"--layer": "1", "--limit": "1"})[0] == 0


def _without_output(result: tuple[int, str, str]) -> tuple[int, str]:
    status, _, err = result
    return status, err


@pytest.mark.parametrize("kind", ["truncated", "not safetensors"])
def test_a_damaged_sae_is_one_line(edit, sae, tmp_path, kind):
    sae.save(tmp_path / "sae")
    weights = tmp_path / "sae" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000] if kind == "truncated" else b"\0" * 99)
    status, _, err = edit({"--sae": str(tmp_path / "sae")})
    assert_one_line(status, err, "is damaged")
    assert not (tmp_path / "set").exists()


def test_a_folder_that_is_something_else_stays(edit, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("mine")
    status, _, err = edit({})
    assert_one_line(status, err, "exists and is not an edit set")
    assert (tmp_path / "set" / "mine.txt").read_text() == "mine"


def test_ctrl_c_is_one_line_and_the_run_goes_on_when_given_again(edit, tmp_path, monkeypatch):
    from microedit_trainer.solvers import executors

    solve, calls = executors.solve_targets, []

    def pressed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*arguments)

    many = [{"prompt": f"The friend of number {n} is", "target": "Al"} for n in range(10)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in many))
    monkeypatch.setattr(executors, "solve_targets", pressed)
    status, _, err = edit({})  # 20 prompts: two batches
    assert (status, err) == (130, "microedit: interrupted\n")
    assert not (tmp_path / "set").exists()
    assert edit({})[0] == 0
    assert len(calls) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl", "set"]


def test_a_process_of_its_own_shows_no_traceback(options, tmp_path):
    """Through the installed command, with a model that the facts do not fit."""
    (tmp_path / "facts.jsonl").write_text(lines_of() + '{"prompt": "p"}')
    words = [word for pair in options.items() for word in pair]
    command = [sys.executable, "-c", "from microedit_vllm.cli.main import main; main()"]
    done = subprocess.run([*command, "edit", *words], capture_output=True, text=True, check=False)
    assert_one_line(done.returncode, done.stderr, "line 5: needs the fields")
    assert done.stdout == ""


def test_a_model_of_another_width_is_refused(edit, tmp_path):
    other = tiny_model(tmp_path / "model", hidden=16)
    status, _, err = edit({"--model": str(other)})
    assert status == 2
    assert "residuals of width 32" in err
    assert not (tmp_path / "set").exists()
