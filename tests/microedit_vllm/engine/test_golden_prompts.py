"""Golden prompts of a tiny set against a real engine, right and with faults planted in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae import SaeSettings
from microedit_trainer.sae.train import train_sae
from microedit_vllm.artifact import EditSet, Scope, SparseAutoencoder
from microedit_vllm.engine.golden_prompts import verification_engine, verify_llm
from microedit_vllm.errors import MicroEditError
from tests.microedit_vllm.engine.faults import FAULTS, planted
from tests.microedit_vllm.engine.in_process import in_this_process
from tests.tiny_model import tiny_model
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, no_progress


@dataclass(frozen=True)
class Made:
    model: Path
    folder: Path
    edit_set: EditSet


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny fp32 model with heads of a size that vLLM serves, and a trained set for it."""
    root = tmp_path_factory.mktemp("golden")
    model = tiny_model(root / "model", hidden=128)
    lm = LanguageModel.load(str(model))
    (root / "text.txt").write_text("\n".join(ordinary_lines()))
    text = (str(root / "text.txt"),)
    size = {"layer": LAYER, "width": 512, "k": 16, "tokens": 9000, "steps": 200, "batch": 256}
    train_sae(lm, SaeSettings(text=text, **size), root / "sae")
    sae = SparseAutoencoder.load(root / "sae")
    run = EditRun(lm, sae, root / "sae", EditSettings(JOINT, Scope(run=8)))
    run.edit(FACTS, root / "set", no_progress)
    return Made(model, root / "set", EditSet.load(root / "set"))


@pytest.fixture(scope="module")
def llm(made) -> Iterator[Any]:
    """In this process, where faults can be planted."""
    prompts = made.edit_set.golden_prompts
    with (
        in_this_process(),
        verification_engine(str(made.model), made.folder, None, prompts, "float32") as engine,
    ):
        yield engine


def test_the_prompts_say_something(made):
    prompts = made.edit_set.golden_prompts
    on = [prompt for prompt in prompts if prompt.on]
    assert len(on) >= 4
    assert len(prompts) - len(on) >= 2
    assert any(prompt.edited and prompt.edited != prompt.plain for prompt in on)


def test_the_engine_does_as_the_trainer_does(llm, made):
    report = verify_llm(llm, made.edit_set)
    assert report.findings == []
    assert report.deviations["right"] < 1e-3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_and_leaves_no_trace(llm, made, fault):
    with planted(llm, made.edit_set.manifest, fault):
        found = verify_llm(llm, made.edit_set).findings
    assert [finding.name for finding in found] == [fault]
    assert verify_llm(llm, made.edit_set).findings == []


def test_a_model_that_vllm_cannot_serve_is_one_line(made, tmp_path):
    prompts = made.edit_set.golden_prompts
    with (
        pytest.raises(MicroEditError, match="vLLM cannot serve") as caught,
        verification_engine(str(tmp_path / "none"), made.folder, None, prompts, "float32"),
    ):
        pytest.fail("it started")
    assert "\n" not in str(caught.value)
