"""The loop over a model's decoder layers, found and checked in its source."""

import ast
from dataclasses import dataclass

from microedit_vllm.engine.model_source import Function, ModelClass
from microedit_vllm.engine.stream_form import (
    Form,
    UnreadableError,
    adds_pair,
    drops_second,
    is_decoder_layer,
    layer_form,
    reads,
    takes_residual,
)

# Calls that pass a layer's output on to another rank or to a draft model, and change nothing.
_BYSTANDERS = ("IntermediateTensors", "self._maybe_add_hidden_state", "aux_hidden_states.append")
# vLLM gathers rows here where it has spread them over ranks; `architectures` refuses that.
_SPREAD_ROWS = "hidden_states.shape[0] != positions.shape[0]"


@dataclass(frozen=True)
class DecoderStack:
    """The class that runs the decoder layers.

    Attributes:
        owner: its `forward`, or one that this overrides, holds the loop over the layers.
        layers: the classes that the layers may have: all that it and the model name.
    """

    owner: ModelClass
    layers: tuple[ModelClass, ...]

    def form(self) -> Form:
        """The form that all layers have and that the stack relies on.

        Raises:
            UnreadableError: see `layer_form`; or layers differ, run several times, or what runs
                them reads or changes their output in another way.
        """
        forms = {layer_form(layer) for layer in self.layers}
        if len(forms) != 1:
            raise UnreadableError("its decoder layers hand over the residual stream in two ways")
        (form,) = forms
        forward, loop, call = _loop_of(self.owner)
        _check_runs_once(self.owner, forward, loop)
        names = [one.id for one in ast.walk(call.targets[0]) if isinstance(one, ast.Name)]
        if form is Form.FUSED or len(names) > 1:
            _check_pair(self, form, names, call)
        _check_between(self.owner, loop, call, names)
        if not (form is Form.FIRST and all(map(drops_second, self.layers))):
            _check_after(self.owner, forward, loop, form, names)
        return form


def find_stack(model: ModelClass) -> DecoderStack:
    """The decoder stack of a model, found by what each class names.

    Raises:
        UnreadableError: none was found, or several.
    """
    queue, owners = [model], []
    seen = {model: None}  # a set that keeps its order
    while queue:
        current = queue.pop(0)
        if _find_loop(current) is not None:
            owners.append(current)
        fresh = [one for one in current.references() if one not in seen]
        seen |= dict.fromkeys(fresh)
        queue += [one for one in fresh if not is_decoder_layer(one)]
    overridden = {base for owner in owners for base in list(owner.line())[1:]}
    owners = [owner for owner in owners if owner not in overridden]
    # A class that only lends its weight loading sits in another module.
    owners = [owner for owner in owners if owner.module == model.module] or owners
    if len(owners) != 1:
        names = ", ".join(owner.name for owner in owners) or "none"
        raise UnreadableError(f"no single loop over decoder layers was found ({names})")
    named = [*owners[0].references(), *model.references()]
    layers = dict.fromkeys(one for one in named if is_decoder_layer(one))
    if not layers:
        raise UnreadableError(f"{owners[0].name} names no class of decoder layers")
    return DecoderStack(owners[0], tuple(layers))


_Loop = tuple[Function, ast.For, ast.Assign]


def _find_loop(owner: ModelClass) -> _Loop | None:
    """The forward that holds a loop over layers, the loop, and the call of a layer in it."""
    for forward in owner.methods("forward"):
        for loop in ast.walk(forward):
            call = _layer_call(loop) if isinstance(loop, ast.For) else None
            if call is not None:
                assert isinstance(loop, ast.For)
                return forward, loop, call
        if "super().forward(" not in ast.unparse(forward):
            return None
    return None


def _loop_of(owner: ModelClass) -> _Loop:
    found = _find_loop(owner)
    assert found is not None, "an owner has a loop"
    return found


def _layer_call(loop: ast.For) -> ast.Assign | None:
    """`… = layer(…)` where `layer` is the loop's variable or an item of `self.layers`."""
    layers = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
    for node in ast.walk(loop):
        if not isinstance(node, ast.Assign):
            continue
        if ast.unparse(node.value).startswith("self.layers["):
            layers.add(ast.unparse(node.targets[0]))
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in layers:
            return node
    return None


def _check_runs_once(owner: ModelClass, forward: Function, loop: ast.For) -> None:
    for outer in ast.walk(forward):
        inside = isinstance(outer, ast.For | ast.While) and outer is not loop
        if inside and any(node is loop for node in ast.walk(outer)):
            raise UnreadableError(f"{owner.name} runs its layers several times for each token")


def _check_pair(stack: DecoderStack, form: Form, names: list[str], call: ast.Assign) -> None:
    """Two values are taken from a layer, and the next one does not read a second of its own."""
    if form is Form.SINGLE or len(names) != 2:
        raise UnreadableError(
            f"{stack.owner.name} takes {len(names)} values from a layer: {', '.join(names)}"
        )
    passes = reads(call.value, names[1])
    if form is Form.FIRST and passes and not all(map(takes_residual, stack.layers)):
        raise UnreadableError(f"{stack.owner.name} passes {names[1]} on to the next layer")


def _check_between(owner: ModelClass, loop: ast.For, call: ast.Assign, names: list[str]) -> None:
    """Between two layers nothing may change the stream."""
    spared = {
        id(inner)
        for node in ast.walk(loop)
        if isinstance(node, ast.If) and _SPREAD_ROWS in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(loop):
        if not isinstance(node, ast.Assign | ast.AugAssign) or node is call or id(node) in spared:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        written = {one.id for t in targets for one in ast.walk(t) if isinstance(one, ast.Name)}
        # `hidden_states = outputs[0]` only names what the layer gave.
        renamed = isinstance(node.value, ast.Subscript) and reads(node.value, names[0])
        if written & set(names) and not renamed:
            raise UnreadableError(f"{owner.name} changes the residual stream between its layers")


def _check_after(
    owner: ModelClass, forward: Function, loop: ast.For, form: Form, names: list[str]
) -> None:
    """Behind the last layer a fused pair is added, and the second of a first pair is not read."""
    if len(names) != 2:
        return
    pair = (names[0], names[1])
    behind = [node for node in ast.walk(forward) if getattr(node, "lineno", 0) > _end(loop)]
    if form is Form.FUSED and not any(adds_pair(owner, node, pair) for node in behind):
        raise UnreadableError(f"{owner.name} does not end with a norm of hidden_states + residual")
    if form is Form.FIRST and _reads_outside_bystanders(behind, pair[1]):
        raise UnreadableError(f"{owner.name} reads the second value of its last layer")


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _reads_outside_bystanders(nodes: list[ast.AST], name: str) -> bool:
    ignored = {
        id(inner)
        for node in nodes
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in _BYSTANDERS)
        or (isinstance(node, ast.Compare) and not reads(node, name))
        for inner in ast.walk(node)
    }
    return any(
        isinstance(node, ast.Name) and id(node) not in ignored and reads(node, name)
        for node in nodes
    )
