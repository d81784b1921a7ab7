"""The hook behind decoder layer l: one custom op that survives torch.compile.

The op finds what to do in vLLM's forward context, so that nothing of a step is baked into a
compiled graph, and runs without a plan (profiling, warm-up, another engine in the same process)
pass through it untouched.

Rows that are off must keep the bits of the plain graph, so the op may not change what inductor
makes of it. Plain, the residual is no tensor at layer l: its sum stays in fp32 inside the kernel of
the next norm. An op that took the residual, as input or to mutate, would have it rounded to the
stream's dtype and stored there, also for rows that are off (`realize_hint` in
`torch/_inductor/graph.py`). hidden_states, the output of a matrix product, is in memory anyway. So
the op reads z, which the graph computes for it alone, and mutates hidden_states alone. Where a
layer ends in a norm or hands on one tensor, nothing is in memory there, and bits do change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available

from microedit_vllm.engine.architectures import form_of
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.stream_form import Form
from microedit_vllm.errors import MicroEditError

OP = "microedit::substitute"
_CONTEXT_KEY = "microedit"
_TOWERS = ("vision", "visual", "audio", "encoder", "draft", "mtp")


@torch.library.custom_op(OP, mutates_args=("hidden_states",))
def substitute(hidden_states: Tensor, z: Tensor | None) -> None:
    """Apply the current step's plan to what a layer hands on, in place.

    Args:
        hidden_states: the layer's output, [M, d]; what is added to it moves z by as much.
        z: hidden_states + residual, [M, d], read only; None where hidden_states is z itself.
    """
    apply = _applies()
    if apply is not None:
        apply(hidden_states, z)


@substitute.register_fake
def _substitute_fake(hidden_states: Tensor, z: Tensor | None) -> None:
    return None


def _applies() -> Callable[[Tensor, Tensor | None], None] | None:
    """What the forward in progress has to do behind the layer; None when that is nothing."""
    if not is_forward_context_available():
        return None
    context = get_forward_context()
    state: EditState | None = context.no_compile_layers.get(_CONTEXT_KEY)
    if state is None:
        return None
    if context.cudagraph_runtime_mode != CUDAGraphMode.NONE and state.captured is not None:
        # A graph is being captured; replays do not come here.
        return state.captured.apply
    return None if state.plan is None else state.apply


def register_state(vllm_config: Any, state: EditState) -> None:
    """Make the op find `state` in every forward context of this engine.

    The way that vLLM's own ops find their layers (`vllm/forward_context.py`).
    """
    vllm_config.compilation_config.static_forward_context[_CONTEXT_KEY] = state


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of decoder layers of a text model, also inside a multimodal one.

    Raises:
        MicroEditError: none of this length was found, or several.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and not any(tower in name.lower() for tower in _TOWERS)
    }
    if len(found) != 1:
        raise MicroEditError(
            f"cannot tell the {num_layers} decoder layers of {type(model).__name__} apart "
            f"(candidates: {', '.join(found) or 'none'}); this architecture is not supported"
        )
    return next(iter(found.values()))


def patch_layer(model: nn.Module, layer: int, num_layers: int) -> bool:
    """Put the op behind decoder layer `layer` (0-based); False where another rank holds it.

    Where z is in the layer's output follows from the class of the loaded layer (`stream_form`).

    Raises:
        MicroEditError: see `decoder_layers` and `form_of`.
    """
    module = decoder_layers(model, num_layers)[layer]
    if type(module).__name__ == "PPMissingLayer":
        return False
    form = form_of(module)
    # Plain bools, which torch.compile folds.
    fused, single = form is Form.FUSED, form is Form.SINGLE
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if isinstance(output, tuple) == single:
            raise MicroEditError(
                f"decoder layer {layer} returns {type(output).__name__} where its source said "
                f"{form.value}; this architecture is not supported"
            )
        # A compiled graph holds the op for every step; without one, idle steps go without.
        if torch.compiler.is_compiling() or _applies():
            hidden_states = output if single else output[0]
            rows = hidden_states
            if rows.ndim > 2:
                # Models of transformers keep a batch of one before the rows.
                rows = rows.view(-1, rows.shape[-1])
            substitute(rows, rows + output[1] if fused else None)
        return output

    module.forward = forward
    return True
