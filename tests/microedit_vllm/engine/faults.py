"""Faults planted in a running engine, and taken out again: eager, and in this very process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from microedit_vllm.artifact import Manifest
from microedit_vllm.engine.layer_patch import decoder_layers, patch_layer

Stream = tuple[Any, Any]
SHIFTS = {"layer_before": -1, "layer_after": 1}
# (hidden_states, residual) → what the patch sees instead.
SEEN: dict[str, Callable[[Any, Any], Stream]] = {
    "hidden_states_alone": lambda h, r: (h.clone(), r * 0),
    "residual_alone": lambda h, r: (r.clone(), h * 0),
    "edit_not_applied": lambda h, r: (h.clone(), r.clone()),
}
# What was kept from the patch, and what the patch gave back → what the layer returns.
RETURNED: dict[str, Callable[[Stream, Stream], Stream]] = {
    "hidden_states_alone": lambda kept, given: (given[0], given[1] + kept[1]),
    "residual_alone": lambda kept, given: (given[0], given[1] + kept[0]),
    "edit_not_applied": lambda kept, given: kept,
}
FAULTS = (*SHIFTS, *SEEN, "patch_never_ran")


@contextmanager
def planted(llm: Any, manifest: Manifest, fault: str) -> Iterator[None]:
    """The engine with one of `FAULTS` inside the block."""
    layer, count = manifest.layer, manifest.model.num_layers
    patched = layer + SHIFTS.get(fault, 0)

    def plant(model: Any) -> None:
        layers = decoder_layers(model, count)
        del layers[layer].forward  # the patch shadows the method
        if fault in SEEN:
            _patch_what_is_seen(model, manifest, fault)
        elif fault in SHIFTS:
            assert patch_layer(model, patched, count)

    def restore(model: Any) -> None:
        layers = decoder_layers(model, count)
        if fault != "patch_never_ran":
            del layers[patched].forward
        assert patch_layer(model, layer, count)

    llm.apply_model(plant)
    try:
        yield
    finally:
        llm.apply_model(restore)


def _patch_what_is_seen(model: Any, manifest: Manifest, fault: str) -> None:
    module = decoder_layers(model, manifest.model.num_layers)[manifest.layer]
    original = module.forward
    kept: list[Stream] = []

    def inner(*args: Any, **kwargs: Any) -> Stream:
        stream = original(*args, **kwargs)
        kept.append(stream)
        return SEEN[fault](*stream)

    module.forward = inner
    assert patch_layer(model, manifest.layer, manifest.model.num_layers)
    seen = module.forward

    def outer(*args: Any, **kwargs: Any) -> Stream:
        given = seen(*args, **kwargs)
        return RETURNED[fault](kept.pop(), given)

    module.forward = outer
