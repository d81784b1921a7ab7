"""`--config`: defaults from a name or a file, which the command line overrules."""

import json

import pytest

from microedit_trainer import calibration_prompts, edit_run
from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_vllm.artifact import EditSet, SparseAutoencoder
from microedit_vllm.cli.main import main
from tests.trainer.tiny_edits import FACTS


@pytest.fixture(autouse=True)
def few_calibration_prompts(monkeypatch):
    few = ordinary_lines()[:8]
    for module in (calibration_prompts, edit_run):
        monkeypatch.setattr(module, "ordinary_lines", lambda: few)
    monkeypatch.setattr(calibration_prompts, "unedited_subjects", lambda others: ["Peru", "Bach"])


@pytest.fixture
def microedit(capsys):
    def microedit(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return microedit


@pytest.fixture
def edit(microedit, lm, sae_folder, tmp_path):
    """`microedit edit` of two facts with further words: status, stdout, stderr."""
    records = [{"prompt": f.prompt, "target": f.target} for f in FACTS[:2]]
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    where = ("--model", lm.folder, "--sae", sae_folder, "--data", data, "--out", tmp_path / "set")
    return lambda *words: microedit("edit", *where, *words)


def config_file(tmp_path, **sections) -> str:
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(sections))
    return str(path)


def test_the_paper_s_settings_reach_the_set_and_another_sae_is_told(edit, tmp_path):
    status, out, _ = edit("--config", "llama3-8b", "--steps-rec", 1, "--steps-edit", 1)
    assert status == 0
    told = " ".join(out.split())
    assert "is for another SAE: layer = 1, not 30; width = 512, not 131072; k = 8, not 192" in told
    manifest = EditSet.load(tmp_path / "set").manifest
    assert (manifest.solver, manifest.position, manifest.layer) == ("sequential", "sequence", 1)
    assert (manifest.decision.statistic, manifest.decision.alpha) == ("absolute", 600)
    assert manifest.decision.tau == 0.5
    assert manifest.hyperparameters["lr"] == 5e-5
    assert manifest.hyperparameters["rows_per_fact"] is None
    assert manifest.hyperparameters["steps_rec"] == 1


def test_the_command_line_wins_over_the_config(edit, tmp_path):
    ours = config_file(tmp_path, edit={"rows_per_fact": 7, "tau": 0.3, "limit": 1})
    assert edit("--config", ours)[0] == 0
    manifest = EditSet.load(tmp_path / "set").manifest
    assert manifest.hyperparameters["rows_per_fact"] == 7
    assert (manifest.decision.tau, manifest.facts) == (0.3, 1)
    assert edit("--rows-per-fact", 8, "--config", ours, "--tau", 0.2)[0] == 0
    manifest = EditSet.load(tmp_path / "set").manifest
    assert manifest.hyperparameters["rows_per_fact"] == 8
    assert (manifest.decision.tau, manifest.facts) == (0.2, 1)


def test_the_config_s_layer_is_for_an_sae_that_names_none(edit, tmp_path, sae):
    SparseAutoencoder(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k).save(tmp_path / "sae")
    ours = config_file(tmp_path, sae={"layer": 0}, edit={"tau": 0.3})
    assert edit("--config", ours, "--sae", tmp_path / "sae")[0] == 0
    assert EditSet.load(tmp_path / "set").manifest.layer == 0
    assert edit("--config", ours, "--sae", tmp_path / "sae", "--layer", 1)[0] == 0
    assert EditSet.load(tmp_path / "set").manifest.layer == 1


def test_an_sae_is_trained_as_the_config_says(microedit, lm, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(ordinary_lines()[:40]))
    ours = config_file(tmp_path, sae={"layer": 1, "width": 40, "k": 3}, train={"steps": 5})
    where = ("--model", lm.folder, "--text", tmp_path / "text.txt", "--out", tmp_path / "sae")
    status, _, err = microedit("sae", "train", *where, "--config", ours, "--k", 4)
    assert status == 0, err
    trained = SparseAutoencoder.load(tmp_path / "sae")
    assert (trained.num_latents, trained.k, trained.report["layer"]) == (40, 4, 1)
    assert trained.report["steps"] == 5


@pytest.mark.parametrize("command", [("edit",), ("sae", "train")])
def test_an_unknown_config_is_one_line(microedit, command):
    status, _, err = microedit(*command, "--config", "llama")
    assert status == 2
    assert err.startswith("microedit: there is no config llama; known ones are llama3-8b, mistral")
    assert err.count("\n") == 1


def test_an_option_that_the_command_lacks_is_one_line(edit, tmp_path):
    status, _, err = edit("--config", config_file(tmp_path, edit={"learning_rate": 1}))
    assert status == 2
    assert "edit: learning_rate is no option of microedit edit" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_a_value_of_another_kind_is_refused(edit, tmp_path):
    status, _, err = edit("--config", config_file(tmp_path, edit={"limit": "many"}))
    assert status == 2
    assert "--limit" in err
    assert not (tmp_path / "set").exists()
