"""Offloading, on a machine without a GPU: what is away is NaN, so that whoever uses it shows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from microedit_trainer import calibration_prompts, edit_run
from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.language_model import LanguageModel, find_decoder_layers
from microedit_vllm.artifact import Scope
from tests.tiny_architectures import CONFIGS, LAYERS, build_architecture
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, SEQUENTIAL

SETTINGS = {
    "joint": EditSettings(replace(JOINT, targets=replace(JOINT.targets, steps=5)), Scope(run=8)),
    "sequential": EditSettings(
        replace(SEQUENTIAL, steps_rec=2, steps_edit=2), Scope(last=None, run=0)
    ),
}


@pytest.fixture
def away(monkeypatch):
    """The modules whose weights are in the CPU's memory, with what they hold."""
    held: dict[nn.Module, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def to(self: nn.Module, where: object) -> nn.Module:
        if self in held:
            for name, value in held.pop(self).items():
                self.get_parameter(name).copy_(value)
        else:
            assert where == "cpu"
            held[self] = {name: p.clone() for name, p in self.named_parameters()}
            for parameter in self.parameters():
                parameter.fill_(torch.nan)
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    return held


@pytest.mark.parametrize("layer", [1, LAYERS - 1])
@pytest.mark.parametrize("architecture", CONFIGS)
@torch.no_grad()
def test_the_upper_half_runs_without_the_lower(architecture, layer, away):
    """Tied heads too: then the embedding stays."""
    model = build_architecture(architecture).requires_grad_(False)
    lm = LanguageModel(model, None, architecture, Path(), find_decoder_layers(model))
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    z = lm.lower(ids, layer)
    logits = lm.logits(lm.upper(z, layer))
    with lm.lower_offloaded(layer):
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert len(away) == layer + 1 + (not tied)
        assert torch.equal(lm.logits(lm.upper(z, layer)), logits)
        assert lm.lower(ids, layer).isnan().all()
    assert not away
    assert torch.equal(lm.lower(ids, layer), z)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_set_is_the_same_with_offload(name, lm, sae, sae_folder, tmp_path, away, monkeypatch):
    few = ordinary_lines()[:12]
    for module in (calibration_prompts, edit_run):
        monkeypatch.setattr(module, "ordinary_lines", lambda: few)
    solved = []
    for offload in (False, True):
        settings = replace(SETTINGS[name], hold_out=FACTS[3:], offload=offload)
        run = EditRun(lm, sae, sae_folder, settings)

        def seen(done: int) -> None:
            solved.append(len(away))

        run.edit(FACTS[:3], tmp_path / str(offload), seen)
        count = len(solved) // (1 + offload)
    # The tiny model's head is its embedding.
    assert solved == [0] * count + [LAYER + 1] * count
    assert not away
    for path in sorted((tmp_path / "False").iterdir()):
        if path.name != "microedit.json":  # it holds the seconds
            assert path.read_bytes() == (tmp_path / "True" / path.name).read_bytes(), path.name


def test_a_failure_brings_the_model_back(lm, away):
    with pytest.raises(KeyboardInterrupt), lm.lower_offloaded(LAYER):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), lm.offloaded():
        assert len(away) == 1
        raise KeyboardInterrupt
    assert not away
    assert not any(p.isnan().any() for p in lm.model.parameters())
