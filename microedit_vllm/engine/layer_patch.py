"""The hook behind decoder layer l: one custom op that survives torch.compile.

The op mutates the layer's output in place and finds what to do in vLLM's forward context, so that
nothing of a step is baked into a compiled graph, and runs without a plan (profiling, warm-up,
another engine in the same process) pass through it untouched.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available

from microedit_vllm.engine.architectures import form_of
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.stream_form import Form
from microedit_vllm.errors import MicroEditError

OP = "microedit::substitute"
_CONTEXT_KEY = "microedit"
_TOWERS = ("vision", "visual", "audio", "encoder", "draft", "mtp")


@torch.library.custom_op(OP, mutates_args=("hidden_states", "residual"))
def substitute(hidden_states: Tensor, residual: Tensor | None) -> None:
    """Apply the current step's plan to a layer's output, [M, d] each, in place."""
    if not is_forward_context_available():
        return
    context = get_forward_context()
    state: EditState | None = context.no_compile_layers.get(_CONTEXT_KEY)
    if state is None:
        return
    if context.cudagraph_runtime_mode == CUDAGraphMode.FULL and state.captured is not None:
        # Runs while a graph is captured; replays do not come here.
        state.captured.apply(hidden_states, residual)
    else:
        state.apply(hidden_states, residual)


@substitute.register_fake
def _substitute_fake(hidden_states: Tensor, residual: Tensor | None) -> None:
    return None


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
        z = output if single else output[0]
        # Models of transformers keep a batch of one before the rows.
        rows = z if z.ndim == 2 else z.view(-1, z.shape[-1])
        substitute(rows, output[1] if fused else None)
        return output

    module.forward = forward
    return True
