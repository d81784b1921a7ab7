"""The patch on layers of transformers, which need no engine; vLLM's own run in the proofs."""

from typing import Any

import pytest
import torch

from microedit_vllm.engine import layer_patch
from microedit_vllm.engine.layer_patch import decoder_layers, patch_layer
from microedit_vllm.errors import MicroEditError
from tests.tiny_architectures import HIDDEN, LAYERS, build_architecture

IDS = torch.arange(3, 10)[None]


class Recorder:
    """Stands for `EditState.apply`: keeps what the op is given, and adds one to row 4."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def __call__(self, hidden_states: torch.Tensor, z: Any) -> None:
        self.seen.append((hidden_states.shape, z))
        hidden_states[4] += 1


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(layer_patch, "_applies", lambda: found)
    return found


@torch.inference_mode()
def states(model: Any) -> Any:
    return model(input_ids=IDS, output_hidden_states=True).hidden_states


def test_a_batch_of_one_is_handed_over_as_rows_and_changed_in_place(recorder):
    model = build_architecture("GPT2LMHeadModel")
    before = states(model)
    assert patch_layer(model, 0, LAYERS)
    after = states(model)
    assert recorder.seen == [((IDS.shape[1], HIDDEN), None)]
    change = after[1] - before[1]
    assert (change[0, 4] - 1).abs().max() < 1e-5
    change[0, 4] = 0
    assert not change.any()
    assert not torch.equal(after[2][0, 4:], before[2][0, 4:])


def test_without_a_step_the_patched_layer_is_the_layer():
    model = build_architecture("GPT2LMHeadModel")
    before = states(model)
    patch_layer(model, 1, LAYERS)
    assert all(map(torch.equal, states(model), before))


def test_an_output_that_is_not_what_the_source_said_is_refused(recorder):
    model = build_architecture("GPT2LMHeadModel")
    layer = model.transformer.h[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (forward(*args, **kwargs), None)
    patch_layer(model, 1, LAYERS)
    with pytest.raises(MicroEditError, match="layer 1 returns tuple where its source said one"):
        states(model)
    assert recorder.seen == []


def test_a_model_without_such_a_list_of_layers_is_refused():
    with pytest.raises(MicroEditError, match="candidates: none"):
        decoder_layers(build_architecture("GPT2LMHeadModel"), LAYERS + 1)
