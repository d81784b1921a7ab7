"""How a decoder layer hands the residual stream z to the next one, read from its source.

Layers return one tensor or a pair, and a pair does not always sum to z:

- fused: (hidden_states, residual), z = hidden_states + residual. Proven where the layer reads the
  two only through a norm that adds them (`RMSNorm` in `vllm/model_executor/layers/layernorm.py`),
  and what follows the last layer adds them too: whatever has the same sum is the same z.
- first: a pair whose first tensor is z and whose second nobody reads (Cohere, StableLM, PhiMoE).
- single: one tensor, which is z.

What cannot be read as one of these is refused: a wrong guess would edit another tensor.
"""

import ast
from enum import Enum

from microedit_vllm.engine.model_source import Function, ModelClass, find_class, imported_from

_LAYERNORM = "vllm.model_executor.layers.layernorm"
_FUSED_NORMS = ("RMSNorm", "GemmaRMSNorm")
_HIDDEN_NAMES = ("hidden_states", "x")
_RESIDUAL = "residual"
# `x.shape` and the like say nothing about the numbers in x.
_ATTRIBUTES_OF_FORM = ("shape", "dtype", "device")


class Form(Enum):
    """Where z is in a layer's output."""

    FUSED = "hidden_states + residual"
    FIRST = "first of a pair"
    SINGLE = "one tensor"


class UnreadableError(Exception):
    """A form that does not follow from the source; the message says why."""


def layer_form(layer: ModelClass) -> Form:
    """The form of one decoder layer class.

    Raises:
        UnreadableError: its source shows none of the three.
    """
    forward = layer.method("forward")
    if forward is None:
        raise UnreadableError(f"{layer.name} has no forward")
    value = _returned(layer, forward)
    pair = isinstance(value, ast.Tuple) and len(value.elts) == 2
    if isinstance(value, ast.Tuple) and not pair:
        raise UnreadableError(f"{layer.name} returns {len(value.elts)} values")
    if not takes_residual(layer):
        return Form.FIRST if pair else Form.SINGLE
    names = (_hidden_name(layer, forward), _RESIDUAL)
    first = _first_read(layer, forward, names)
    if not pair:
        raise UnreadableError(f"{layer.name} takes a residual and returns none")
    if ast.unparse(first) == f"{_RESIDUAL} = {names[0]}":
        return Form.FIRST
    if not _reads_the_sum(layer, first, names):
        raise UnreadableError(
            f"{layer.name} does not read hidden_states and residual through a norm of their sum"
        )
    return Form.FUSED


def takes_residual(layer: ModelClass) -> bool:
    """Whether the layer has a parameter for the last one's second tensor."""
    forward = layer.method("forward")
    return forward is not None and _RESIDUAL in [one.arg for one in forward.args.args]


def scales_in_float16(layer: ModelClass) -> bool:
    """Whether the layer treats float16 apart.

    DeepSeek scales the stream against overflow there (`vllm/model_executor/models/deepseek_v2.py`),
    so that its z is not the model's.
    """
    forward = layer.method("forward")
    return forward is not None and "float16" in ast.unparse(forward)


def is_decoder_layer(one: ModelClass) -> bool:
    """Whether a class is a decoder layer: by its name, what it takes, and its attention."""
    forward = one.method("forward")
    return (
        one.name.endswith(("Layer", "Block"))
        and forward is not None
        and any(argument.arg in _HIDDEN_NAMES for argument in forward.args.args)
        and any("att" in name or name == "mixer" for name in one.attributes())
    )


def drops_second(layer: ModelClass) -> bool:
    """Whether the layer's second value is always None."""
    forward = layer.method("forward")
    value = _returned(layer, forward) if forward is not None else None
    return isinstance(value, ast.Tuple) and ast.unparse(value.elts[1]) == "None"


def reads(node: ast.AST, name: str) -> bool:
    """Whether the numbers in `name` are read; its shape, and whether it is None, are not."""
    if isinstance(node, ast.Name):
        return node.id == name and isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Attribute) and node.attr in _ATTRIBUTES_OF_FORM:
        return False
    if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "None":
        return False
    return any(reads(child, name) for child in ast.iter_child_nodes(node))


def adds_pair(owner: ModelClass, node: ast.AST, pair: tuple[str, str]) -> bool:
    """Whether `node` is the sum of a pair, or `self.<norm>(pair…)` with a norm that adds it."""
    if ast.unparse(node) == " + ".join(pair):
        return True
    if not isinstance(node, ast.Call) or [ast.unparse(one) for one in node.args] != list(pair):
        return False
    norms = list(owner.assigned(ast.unparse(node.func).removeprefix("self.")))
    return bool(norms) and all(_adds_its_residual(*norm) for norm in norms)


def _adds_its_residual(module: str, name: str) -> bool:
    origin = imported_from(module, name)
    if origin is not None and origin[0] == _LAYERNORM:
        return origin[1] in _FUSED_NORMS
    own = find_class(module, name)
    forward = own.method("forward_native") if own is not None else None
    return forward is not None and any(
        ast.unparse(statement) == "if residual is not None:\n    x = x + residual\n    residual = x"
        for statement in forward.body
    )


def _returned(layer: ModelClass, forward: Function) -> ast.expr:
    returns = [
        node.value for node in ast.walk(forward) if isinstance(node, ast.Return) and node.value
    ]
    if len(returns) != 1:
        raise UnreadableError(f"{layer.name} returns at {len(returns)} places")
    return returns[0]


def _hidden_name(layer: ModelClass, forward: Function) -> str:
    parameters = [argument.arg for argument in forward.args.args]
    for name in _HIDDEN_NAMES:
        if name in parameters:
            return name
    raise UnreadableError(f"{layer.name} takes no hidden_states")


def _first_read(layer: ModelClass, forward: Function, pair: tuple[str, str]) -> ast.stmt:
    """The first statement that reads what comes in."""
    for statement in forward.body:
        if any(reads(statement, name) for name in pair):
            return statement
    raise UnreadableError(f"{layer.name} does not read {pair[0]}")


def _reads_the_sum(layer: ModelClass, first: ast.stmt, pair: tuple[str, str]) -> bool:
    """`if residual is None: … else: hidden_states, residual = self.norm(hidden_states, residual)`,
    or the assignment alone; nothing of the two is left behind it."""
    if isinstance(first, ast.If) and ast.unparse(first.test) == f"{_RESIDUAL} is None":
        if not first.orelse:
            return False
        first = first.orelse[0]
    return (
        isinstance(first, ast.Assign)
        and ast.unparse(first.targets[0]) == f"({pair[0]}, {pair[1]})"
        and adds_pair(layer, first.value, pair)
    )
