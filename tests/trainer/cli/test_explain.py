import json
import shutil
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from matplotlib.image import imread
from typer.testing import CliRunner

from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.cli.explain import explain
from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_vllm.artifact import Scope
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_sae
from tests.tiny_model import tiny_model
from tests.trainer.tiny_edits import FACTS, JOINT, no_progress

KEYS = {
    "edit_set",
    "model",
    "layer",
    "context",
    "prompt",
    "system",
    "statistic",
    "alpha",
    "tau",
    "ard",
    "on",
    "decision_position",
    "top_k",
    "tokens",
    "scoring",
    "carried",
    "edit",
    "nearest",
    "facts_compared",
    "facts_total",
    "before",
    "after",
}


@pytest.fixture(scope="module")
def made(lm, sae, sae_folder, tmp_path_factory):
    """A folder with model, SAE and edit set, as `make demo` leaves them."""
    folder = tmp_path_factory.mktemp("explained")
    shutil.copytree(sae_folder, folder / "sae")
    shutil.copytree(lm.folder, folder / "model")
    EditRun(lm, sae, folder / "sae", EditSettings(JOINT, Scope(run=8), tau=0.6)).edit(
        FACTS, folder / "set", no_progress
    )
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "made")


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(explain)

    def run(folder, *words, prompt=FACTS[0].prompt):
        arguments = [folder / "set", "--prompt", prompt, "--max-tokens", "4", *words]
        return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})

    return run


def one_line(result) -> str:
    """The line that `main` prints for a user's mistake."""
    assert isinstance(result.exception, MicroEditError)
    assert result.stdout == ""
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_json_holds_everything_and_nothing_else(run, made):
    result = run(made, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert set(found) == KEYS
    assert found["on"] is True
    assert found["model"] == str(made / "model")
    assert found["nearest"][0]["fact"] == 1
    assert set(found["tokens"][0]) == {
        "position",
        "id",
        "text",
        "scored",
        "sink",
        "ratio",
        "run_ard",
        "decides",
        "changed",
    }
    assert found["scoring"]["rows"][0]["facts"][0].keys() == {"fact", "prompt", "share"}
    assert found["after"].startswith(FACTS[0].target)


def test_a_person_gets_the_decision_the_tokens_the_rows_and_the_facts(run, made):
    found = json.loads(run(made, "--json").stdout)
    shown = run(made, "--rows", "3").stdout
    assert f"relative ARD {found['ard']:.3f} ≤ τ 0.600: the switch is on" in shown
    for row in found["scoring"]["rows"][:3] + found["edit"]["rows"][:3]:
        assert f" {row['latent']} " in shown
    assert str(found["scoring"]["rows"][3]["latent"]) not in shown.split("strongest")[0]
    for fact in FACTS:
        assert fact.target in shown
    assert f"after  {found['after']}" in shown


def test_an_unrelated_prompt_is_off(run, made):
    result = run(made, prompt=ordinary_lines()[1])
    assert "> τ 0.600: the switch is off" in result.stdout


def test_in_chat_behind_a_system_prompt(run, made):
    result = run(made, "--json", "--chat", "--system", "You are a [pirate].")
    found = json.loads(result.stdout)
    assert found["context"] == "chat"
    scored = [token["text"] for token in found["tokens"] if token["scored"]]
    assert "".join(scored) == FACTS[0].prompt
    text = "".join(token["text"] for token in found["tokens"])
    assert text.startswith("<|im_start|>system\nYou are a [pirate].<|im_end|>")
    shown = run(made, "--chat", "--system", "You are a [pirate].").stdout
    assert "tokens before)" in shown


def test_the_picture_is_written_beside_the_text(run, made, tmp_path):
    result = run(made, "--out", tmp_path / "why.png")
    assert result.exit_code == 0
    assert imread(tmp_path / "why.png").shape[2] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["why.png"]


def test_what_is_wrong_is_one_line_and_leaves_no_picture(run, made, tmp_path):
    picture = tmp_path / "why.png"
    wrong = {
        "the prompt is empty": run(made, "--out", picture, prompt="  "),
        "a system prompt needs a chat": run(made, "--out", picture, "--system", "x"),
        "is not a folder": run(tmp_path / "nowhere", "--out", picture),
        "ends in .png": run(made, "--out", tmp_path / "why.pdf"),
        "is not a model folder": run(made, "--model", "./nowhere", "--out", picture),
        "has 900 tokens": run(made, "--out", picture, prompt="a" * 900),
        "cannot load a causal": run(made, "--dtype", "float99", "--out", picture),
    }
    for message, result in wrong.items():
        assert message in one_line(result)
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_sae_is_refused(run, folder, tmp_path):
    other = tiny_model(tmp_path / "other", seed=1)
    assert "was made for model (fingerprint" in one_line(run(folder, "--model", other))
    tiny_sae(d=32).save(folder / "sae")
    assert "is not the one that the edit set was made with" in one_line(run(folder))


def test_a_model_that_lies_elsewhere_is_named(run, folder, monkeypatch):
    (folder / "model").rename(folder.parent / "moved")
    message = one_line(run(folder))
    assert "made for model, which lies neither beside the set nor here" in message
    assert run(folder, "--model", folder.parent / "moved").exit_code == 0
    (folder.parent / "moved").rename(folder.parent / "model")
    monkeypatch.chdir(folder.parent)
    assert run(folder).exit_code == 0


def test_a_model_without_a_chat_template_has_no_chat(run, folder):
    (folder / "model" / "chat_template.jinja").unlink()
    manifest = folder / "set" / "microedit.json"
    found = json.loads(manifest.read_text())
    found["decision"]["turn"] = None
    manifest.write_text(json.dumps(found))
    assert "no chat template" in one_line(run(folder, "--chat"))


def test_the_command_is_registered():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    value = project["project"]["entry-points"]["microedit.commands"]["explain"]
    assert EntryPoint("explain", value, "microedit.commands").load() is explain
