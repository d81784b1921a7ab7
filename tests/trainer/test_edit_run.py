import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.facts import Fact, prompt_digest
from microedit_trainer.model_wordings import FILE, ModelWordings
from microedit_trainer.solvers import JointSolver, executors, sequential
from microedit_vllm.artifact import (
    EditOperator,
    EditSet,
    Scope,
    SparseAutoencoder,
    atomic,
    edit_set,
    fingerprint_model,
)
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_sae
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, SEQUENTIAL, no_progress

SETTINGS = {
    "joint": EditSettings(JOINT, Scope(run=8)),
    "sequential": EditSettings(SEQUENTIAL, Scope(last=None, run=0), contexts=("bare", "chat")),
}
EDITS = "edits.safetensors"


@pytest.fixture
def run_of(lm, sae, sae_folder):
    def run_of(name: str = "joint", **changes) -> EditRun:
        return EditRun(lm, sae, sae_folder, replace(SETTINGS[name], **changes))

    return run_of


@pytest.fixture(scope="module", params=SETTINGS)
def made(request, lm, sae, sae_folder, tmp_path_factory):
    """A set of each solver: its name and its folder."""
    out = tmp_path_factory.mktemp(request.param) / "set"
    EditRun(lm, sae, sae_folder, SETTINGS[request.param]).edit(FACTS, out, no_progress)
    return request.param, out


def droppings(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stopped_after(units: int):
    """A progress callback that presses Ctrl-C when so much is done."""
    done = 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        if done >= units:
            raise KeyboardInterrupt

    return progress


def test_the_set_is_one_that_a_server_takes(made, lm, sae, sae_folder):
    name, out = made
    loaded = EditSet.load(out)
    loaded.check_model(fingerprint_model(lm.folder), lm.name)
    loaded.check_sae(SparseAutoencoder.load(loaded.sae_folder(out)), sae_folder)
    EditOperator.build(loaded, sae).check_golden()
    manifest = loaded.manifest
    assert (manifest.solver, manifest.layer, manifest.facts) == (name, LAYER, len(FACTS))
    assert manifest.decision.max_norm == sae.report["max_norm"]
    assert manifest.scores["seconds_per_edit"] > 0
    assert loaded.is_shared == (name == "sequential")
    assert droppings(out.parent) == []


def test_ordinary_prompts_stay_off(made):
    name, out = made
    scores = EditSet.load(out).manifest.scores
    calibration = scores["calibration"]
    # The paper's solver tolerates a few; see EditRun.calibrate.
    assert calibration["fires"]["ordinary"] <= (0.0 if name == "joint" else 0.05)
    assert calibration["prompts"]["ordinary"] == 2 * len(ordinary_lines()[1::2])
    if name == "joint":
        for kind in ("swapped", "invented"):
            assert calibration["prompts"][kind] == 2 * sum(f.subject in f.prompt for f in FACTS)
            assert calibration["fires"][kind] <= 0.05


def test_the_set_carries_golden_prompts_that_are_clear(made, lm, sae):
    _, out = made
    loaded = EditSet.load(out)
    tau = loaded.manifest.decision.tau
    prompts = loaded.golden_prompts
    assert {prompt.on for prompt in prompts} == {True, False}
    assert len(prompts) <= 12
    own = {tuple(lm.tokenizer(fact.prompt).input_ids) for fact in FACTS}
    for prompt in prompts:
        assert abs(prompt.ard - tau) >= 0.149 * tau
        assert prompt.on or prompt.token_ids not in own


def test_jointly_edited_facts_switch_on_and_answer_in_both_contexts(lm, sae, sae_folder, tmp_path):
    run = EditRun(lm, sae, sae_folder, replace(SETTINGS["joint"], near_rate=1.0))
    found = run.edit(FACTS, tmp_path / "set", no_progress)
    for line in EditSet.load(tmp_path / "set").facts:
        assert line["on"] and line["on_chat"]
        assert line["rel"] == line["rel_chat"] == 1.0
        assert max(line["ard"], line["ard_chat"]) <= found.manifest.decision.tau
    assert found.manifest.scores["rel"] == 1.0
    assert found.manifest.decision.margin_edited > 0


def test_progress_counts_to_the_end(run_of, tmp_path):
    for solver in SETTINGS:
        counted = []
        run = run_of(solver)
        run.edit(FACTS, tmp_path / solver, counted.append)
        assert sum(counted) == run.units(FACTS)


@pytest.mark.parametrize("done", [1, 3])
def test_a_killed_run_gives_what_an_unbroken_one_gives(made, run_of, tmp_path, monkeypatch, done):
    name, whole = made
    run, out = run_of(name), tmp_path / "set"
    units = done * run.units(FACTS) // len(FACTS)
    with pytest.raises(KeyboardInterrupt):
        run.edit(FACTS, out, stopped_after(units))
    assert not out.exists()
    solved = []
    owner, solve = (
        (executors, "solve_targets") if name == "joint" else (sequential.SequentialSolver, "_edit")
    )
    original = getattr(owner, solve)
    monkeypatch.setattr(owner, solve, lambda *a: solved.append(a) or original(*a))
    run_of(name).edit(FACTS, out, no_progress)
    # Joint: batches of two of all eight prompts; sequential: two contexts a fact.
    left = (len(FACTS) - done) * (1 if name == "joint" else 2)
    assert len(solved) == left
    assert (out / EDITS).read_bytes() == (whole / EDITS).read_bytes()
    for golden in ("golden.safetensors", "golden_prompts.json"):
        assert content(out)[golden] == content(whole)[golden]
    assert droppings(tmp_path) == []


@pytest.mark.parametrize("solver", SETTINGS)
def test_a_changed_facts_file_does_not_go_on_with_old_work(run_of, tmp_path, solver):
    changed = [*FACTS[:1], replace(FACTS[1], target="Bob"), *FACTS[2:]]
    run = run_of(solver)
    with pytest.raises(KeyboardInterrupt):
        run.edit(FACTS, tmp_path / "set", stopped_after(run.units(FACTS) // 2))
    run.edit(changed, tmp_path / "set", no_progress)
    run.edit(changed, tmp_path / "fresh", no_progress)
    assert (tmp_path / "set" / EDITS).read_bytes() == (tmp_path / "fresh" / EDITS).read_bytes()


@pytest.mark.parametrize("setting", ["solver", "contexts"])
def test_other_settings_do_not_go_on_with_old_work(run_of, tmp_path, setting):
    other = {
        "solver": replace(JOINT, targets=replace(JOINT.targets, penalty=5.0)),
        "contexts": ("chat",),
    }[setting]
    run = run_of()
    with pytest.raises(KeyboardInterrupt):
        run.edit(FACTS, tmp_path / "set", stopped_after(4))
    other_run = run_of(**{setting: other})
    other_run.edit(FACTS, tmp_path / "set", no_progress)
    other_run.edit(FACTS, tmp_path / "fresh", no_progress)
    assert (tmp_path / "set" / EDITS).read_bytes() == (tmp_path / "fresh" / EDITS).read_bytes()


def test_a_stopped_run_keeps_the_set_that_was_there(run_of, tmp_path):
    out = tmp_path / "set"
    run_of().edit(FACTS[:1], out, no_progress)
    before = content(out)
    with pytest.raises(KeyboardInterrupt):
        run_of().edit(FACTS, out, stopped_after(2))
    assert content(out) == before
    run_of().edit(FACTS, out, no_progress)
    assert EditSet.load(out).manifest.facts == len(FACTS)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_no_edit_set_is_never_replaced(run_of, tmp_path, kind):
    out = tmp_path / "thesis"
    if kind == "file":
        out.write_text("years of work")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.tex").write_text("years of work")
    with pytest.raises(MicroEditError, match="exists and is not an edit set"):
        run_of().edit(FACTS, out, no_progress)
    if kind == "file":
        assert out.read_text() == "years of work"
    else:
        assert [path.name for path in out.iterdir()] == ["thesis.tex"] * (kind == "folder")
    assert droppings(tmp_path) == []


def test_an_sae_of_another_width_is_refused(lm, tmp_path):
    other = replace(tiny_sae(d=24), report={"layer": LAYER})
    with pytest.raises(MicroEditError, match=r"residuals of width 24, .* has 32"):
        EditRun(lm, other, tmp_path, SETTINGS["joint"])


@pytest.mark.parametrize(
    ("report", "layer", "message"),
    [
        ({}, None, "does not say which layer"),
        ({"layer": 7}, None, "layer 7 does not exist"),
        ({"layer": 1}, 3, "layer 3 does not exist"),
        ({"layer": 1}, -1, "layer -1 does not exist"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(lm, sae, tmp_path, report, layer, message):
    other = replace(sae, report=report)
    with pytest.raises(MicroEditError, match=message):
        EditRun(lm, other, tmp_path, replace(SETTINGS["joint"], layer=layer))


def test_an_sae_from_elsewhere_gets_its_layer_and_sink_norm_here(lm, sae, sae_folder, tmp_path):
    foreign = replace(sae, report={})
    run = EditRun(lm, foreign, sae_folder, replace(SETTINGS["joint"], layer=LAYER))
    assert run.max_norm == pytest.approx(sae.report["max_norm"], rel=0.2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("?!", r"fact 2: the prompt '\?!' is too short"),
        ("x" * 600, "more than the model's context of 512"),
    ],
    ids=["short", "long"],
)
def test_a_fact_that_cannot_be_edited_is_named_before_anything_is_written(
    lm, sae, sae_folder, tmp_path, prompt, message
):
    run = EditRun(lm, sae, sae_folder, replace(SETTINGS["joint"], contexts=("bare",)))
    facts = [FACTS[0], Fact(prompt, "Zoe")]
    with pytest.raises(MicroEditError, match=message):
        run.edit(facts, tmp_path / "set", no_progress)
    assert list(tmp_path.iterdir()) == []


def test_contradictions_and_repetitions_are_noted(run_of, tmp_path):
    facts = [FACTS[0], replace(FACTS[0], target="Per"), FACTS[1], FACTS[1]]
    run_of().edit(facts, tmp_path / "set", no_progress)
    lines = [
        json.loads(line) for line in (tmp_path / "set/facts.jsonl").read_text().split("\n")[:-1]
    ]
    assert [line["notes"] for line in lines] == [
        ["contradicts fact 2"],
        ["contradicts fact 1"],
        ["repeats fact 4"],
        ["repeats fact 3"],
    ]
    assert lines[0]["paraphrases"] == ["Australia's capital city is"]


def test_held_out_records_calibrate_and_are_remembered(run_of, tmp_path):
    held_out = [Fact("The capital of Peru is", "x", "Peru"), Fact("The colour of soot is", "x")]
    found = run_of(hold_out=held_out).edit(FACTS, tmp_path / "set", no_progress)
    calibration = found.manifest.scores["calibration"]
    assert calibration["prompts"]["held_out"] == 4  # in two contexts
    assert calibration["fires"]["held_out"] == 0.0
    digests = [prompt_digest(fact.prompt) for fact in held_out]
    assert found.manifest.hyperparameters["held_out"] == digests


def test_a_fixed_tau_is_kept_and_its_margins_are_its_own(run_of, tmp_path):
    found = run_of(tau=0.1).edit(FACTS, tmp_path / "set", no_progress).manifest
    assert found.decision.tau == found.scores["calibration"]["tau"] == 0.1
    lines = EditSet.load(tmp_path / "set").facts
    ards = torch.tensor([[line["ard"], line["ard_chat"]] for line in lines])
    assert found.scores["calibration"]["fires"]["edited"] == float((ards <= 0.1).float().mean())
    assert found.decision.margin_edited == pytest.approx(
        0.1 - float(ards.flatten().quantile(0.99)), abs=1e-3
    )


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_tau_is_refused_at_once(tau):
    with pytest.raises(MicroEditError, match="tau"):
        EditSettings(JOINT, Scope(run=8), tau=tau)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NO_SPACE_IN_RUST = SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["work folder", "checkpoint", "set"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    run_of, tmp_path, monkeypatch, where
):
    out = tmp_path / "set"
    run_of().edit(FACTS[:1], out, no_progress)
    before = content(out)
    written = []
    fdopen = os.fdopen

    def full(handle, *arguments):
        written.append(handle)
        if len(written) > (0 if where == "work folder" else 2):
            os.close(handle)
            raise NO_SPACE
        return fdopen(handle, *arguments)

    def full_in_rust(*args):
        raise NO_SPACE_IN_RUST

    with monkeypatch.context() as patched:
        if where == "set":
            patched.setattr(edit_set, "save_file", full_in_rust)
        else:
            patched.setattr(atomic.os, "fdopen", full)
        with pytest.raises(MicroEditError, match=r"cannot write .*No space left"):
            run_of().edit(FACTS, out, no_progress)
    assert content(out) == before
    assert droppings(tmp_path) in ([], [".set-work"])
    run_of().edit(FACTS, out, no_progress)
    assert EditSet.load(out).manifest.facts == len(FACTS)
    assert droppings(tmp_path) == []


def test_a_subject_that_the_switch_cannot_see_is_not_swapped(run_of):
    """Behind a long passage the scored tokens are the fact's own, whoever it is about."""
    passage = " ".join(f"word{number}" for number in range(20))
    seen = Fact("The capital of Wakanda is", "Mel", "Wakanda")
    unseen = Fact(f"This is about Gondor. {passage} He was born in", "Mel", "Gondor")
    swapped = run_of().calibration_prompts.swapped([seen, unseen])
    assert len(swapped) == 1
    assert swapped[0].startswith("The capital of ") and "Wakanda" not in swapped[0]


def test_a_carrying_set_has_seen_its_subjects_in_other_texts(run_of, tmp_path, monkeypatch):
    seen, real = [], JointSolver.solve

    def solve(solver, problem, progress):
        seen.append([len(texts) for texts in problem.mentions])
        return real(solver, problem, progress)

    monkeypatch.setattr(JointSolver, "solve", solve)
    for carries in (True, False):
        run = run_of(solver=replace(JOINT, carries=carries), contexts=("bare",))
        run.edit(FACTS[:2], tmp_path / str(carries), no_progress)
    assert seen == [[2, 2], []]


def test_the_models_wordings_are_trained_and_kept(run_of, tmp_path, monkeypatch):
    said = "By whom was the Iliad of all poems written?"
    monkeypatch.setattr(ModelWordings, "_generated", lambda self, text, beams: [said])
    problems = []
    solve = JointSolver.solve

    def watched(self, problem, progress):
        problems.append(problem)
        return solve(self, problem, progress)

    monkeypatch.setattr(JointSolver, "solve", watched)
    stages = set()
    run = run_of(solver=replace(JOINT, model_wordings=2), targets=tmp_path / "targets")
    made = run.edit(FACTS, tmp_path / "set", no_progress, lambda name, *_: stages.add(name))
    wanted = [run.contexts.render(name, said, subject="Iliad") for name in run.context_names]
    assert [p.tokens for p in problems[0].worded] == wanted
    assert [len(z) for z in problems[0].reworded] == [2, 2, 2, 4] * 2
    assert made.manifest.hyperparameters["model_wordings"] == 2
    assert stages >= {"wording", "wordings"}
    assert (tmp_path / "targets" / FILE).is_file()


def test_a_held_out_record_that_is_too_long_ends_the_run_before_its_work(run_of, tmp_path):
    run = run_of(hold_out=[Fact("x" * 600, "x")])
    with pytest.raises(MicroEditError, match="more than the model's context of 512"):
        run.edit(FACTS[:1], tmp_path / "set", no_progress)
    assert list(tmp_path.iterdir()) == []


def test_a_fact_that_just_fits_is_edited_without_what_does_not(run_of, lm, tmp_path):
    """Its rewordings, and its wordings about other subjects, are longer than the context."""
    fact = Fact(f"{'x' * (lm.max_length - 30)} The capital of Oz is", "Mel", "Oz")
    out = tmp_path / "set"
    run_of(contexts=("bare",)).edit([fact, FACTS[0]], out, no_progress)
    assert EditSet.load(out).facts[0]["rel"] == 1
