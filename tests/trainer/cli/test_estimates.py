"""What a run says before it starts, and how it ends where it cannot fit."""

import json
import re

import pytest

from microedit_trainer.cli import estimates
from microedit_trainer.estimate import Machine
from microedit_trainer.language_model import LanguageModel
from microedit_vllm.cli.main import main
from tests.trainer.tiny_edits import FACTS


@pytest.fixture
def microedit(capsys):
    def microedit(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return microedit


@pytest.fixture
def commands(lm, sae_folder, tmp_path):
    """Both commands of an edit set and an SAE in `tmp_path`."""
    records = [{"prompt": f.prompt, "target": f.target} for f in FACTS]
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = ("--model", lm.folder)
    size = ("--layer", 1, "--width", 512, "--k", 8, "--text", data, "--out", tmp_path / "sae")
    where = ("--sae", sae_folder, "--data", data, "--out", tmp_path / "set")
    return {"edit": ("edit", *model, *where), "sae": ("sae", "train", *model, *size)}


@pytest.mark.parametrize("name", ["edit", "sae"])
def test_a_run_that_cannot_fit_is_one_line(name, commands, microedit, monkeypatch, tmp_path):
    monkeypatch.setattr(LanguageModel, "load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(Machine, "here", lambda: Machine("cuda", 10_000, 1 << 40))
    status, out, err = microedit(*commands[name])
    assert (status, out) == (2, "")
    assert re.match(r"microedit: this run needs about \d\.\d GiB of memory on cuda", err)
    assert "even with --dtype bfloat16 --offload it needs" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["facts.jsonl"]


def test_a_small_run_is_told_in_a_line_and_a_big_one_by_stages(commands, microedit, monkeypatch):
    status, out, _ = microedit(*commands["edit"], "--limit", 1)
    assert status == 0
    assert re.search(r"takes about \d\.\d of \d+\.\d GiB free on cpu \(.*\), and \d+ s", out)
    assert "storing residuals" not in out
    monkeypatch.setattr(estimates, "BIG", 0)
    status, out, _ = microedit(*commands["edit"], "--limit", 1)
    assert status == 0
    assert "storing residuals" in out
