"""The hook behind decoder layer l: one custom op that survives torch.compile.

The op mutates the layer's output in place and finds what to do in vLLM's forward context, so that
nothing of a step is baked into a compiled graph, and runs without a plan (profiling, warm-up,
another engine in the same process) pass through it untouched.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context, is_forward_context_available

from microedit_vllm.engine.architectures import form_of
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.step_plan import StepPlan
from microedit_vllm.engine.stream_form import Form
from microedit_vllm.errors import MicroEditError

CONTEXT_KEY = "microedit"
_TOWERS = ("vision", "visual", "audio", "encoder", "draft", "mtp")


@torch.library.custom_op("microedit::substitute", mutates_args=("hidden_states", "residual"))
def substitute(hidden_states: Tensor, residual: Tensor | None) -> None:
    """Apply the current step's plan to a layer's output, [M, d] each, in place."""
    step = _current_step()
    if step is not None:
        state, plan = step
        state.apply(plan, hidden_states, residual)


@substitute.register_fake
def _substitute_fake(hidden_states: Tensor, residual: Tensor | None) -> None:
    return None


def _current_step() -> tuple[EditState, StepPlan] | None:
    if not is_forward_context_available():
        return None
    return get_forward_context().additional_kwargs.get(CONTEXT_KEY)


def set_current_step(state: EditState, plan: StepPlan) -> None:
    """Leave a step's plan for the op, in the forward context that is open."""
    get_forward_context().additional_kwargs[CONTEXT_KEY] = (state, plan)


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
