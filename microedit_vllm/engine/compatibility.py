"""Is the vLLM that is installed the one that `private_names` describes?

Read from vLLM's source, not imported: a server checks its own model runner's names in the process
that reads the flags, where importing a worker's modules would take seconds, or a GPU.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from microedit_vllm.engine.private_names import PRIVATE_NAMES, SUPPORTED, PrivateName
from microedit_vllm.errors import MicroEditError

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def check_private_names(use_v2_model_runner: bool) -> None:
    """Compare the names that one model runner needs, and those that both do.

    Args:
        use_v2_model_runner: `VllmConfig.use_v2_model_runner`.

    Raises:
        MicroEditError: some are gone, or have lost a parameter or an attribute; all are named.
    """
    other = "v1" if use_v2_model_runner else "v2"
    changes = [
        change for each in PRIVATE_NAMES if each.runner != other for change in changes_of(each)
    ]
    if changes:
        from vllm import __version__

        raise MicroEditError(
            f"vLLM {__version__} changed what edits rely on: {'; '.join(changes)}; this release "
            f"supports vLLM {SUPPORTED}"
        )


def changes_of(name: PrivateName, exact: bool = False) -> list[str]:
    """What became of a name in the vLLM that is installed; empty where it is as described.

    Args:
        exact: a new parameter counts, too.
    """
    place = f"{name.module}.{name.name}"
    tree = _source(name.module)
    if tree is None:
        return [f"{name.module} is gone"]
    definition = _find(tree.body, name.name.split("."))
    if definition is None:
        return [f"{place} is gone"]
    if name.parameters is None:
        known = set(_attributes(definition)) if isinstance(definition, ast.ClassDef) else set()
        missing = [attribute for attribute in name.attributes if attribute not in known]
        return [f"{place} has no {', '.join(missing)}"] if missing else []
    if not isinstance(definition, _Function):
        return [f"{place} is no function"]
    found = _parameters(definition)
    kept = [parameter for parameter in found if parameter in name.parameters]
    if (found if exact else kept) == list(name.parameters):
        return []
    return [f"{place} takes ({', '.join(found)}), not ({', '.join(name.parameters)})"]


@cache
def _source(module: str) -> ast.Module | None:
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _find(body: list[ast.stmt], path: list[str]) -> ast.stmt | None:
    """What binds a dotted name: a class, a function, or (last part only) an import or a value."""
    for node in _statements(body):
        if isinstance(node, ast.ClassDef | _Function) and node.name == path[0]:
            if len(path) == 1:
                return node
            found = _find(node.body, path[1:])
            if found is not None:
                return found
        elif path in _bound(node):
            return node
    return None


def _bound(node: ast.stmt) -> list[list[str]]:
    match node:
        case ast.ImportFrom():
            return [[alias.asname or alias.name] for alias in node.names]
        case ast.Assign():
            return [[target.id] for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [[name]]
    return []


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body and of the branches in it."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _attributes(definition: ast.ClassDef) -> Iterator[str]:
    """Fields, methods and properties of a class, and what its methods set on self."""
    for node in _statements(definition.body):
        if isinstance(node, _Function):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
    for inner in ast.walk(definition):
        match inner:
            case ast.Attribute(value=ast.Name(id="self"), attr=attribute, ctx=ast.Store()):
                yield attribute


def _parameters(definition: _Function) -> list[str]:
    arguments = definition.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return [name for name in names if name not in ("self", "cls")]
