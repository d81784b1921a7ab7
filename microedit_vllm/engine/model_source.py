"""Model classes of vLLM and transformers as source: read with `ast`, never imported.

Importing one of vLLM's model modules may pull in kernels that a platform lacks, and some hundred
of them take minutes; their text is always there.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

Function = ast.FunctionDef
_MODELS = ("vllm.model_executor.models.", "transformers.models.")


@dataclass(frozen=True)
class ModelClass:
    """A class in a model module, by the module's dotted name and its own."""

    module: str
    name: str

    @property
    def node(self) -> ast.ClassDef:
        return _classes(self.module)[self.name]

    def line(self) -> Iterator["ModelClass"]:
        """The class and its bases in model modules, nearest first."""
        yield self
        for base in self.node.bases:
            known = find_class(self.module, base.id) if isinstance(base, ast.Name) else None
            if known is not None:
                yield from known.line()

    def base_names(self) -> set[str]:
        """Names of all bases, also of those that live elsewhere."""
        return {
            ast.unparse(base).rsplit(".", 1)[-1] for one in self.line() for base in one.node.bases
        }

    def method(self, name: str) -> Function | None:
        """The method as the class has it, its own or inherited."""
        return next(self.methods(name), None)

    def methods(self, name: str) -> Iterator[Function]:
        """The method and those that it overrides, nearest first."""
        for one in self.line():
            for statement in one.node.body:
                if isinstance(statement, ast.FunctionDef) and statement.name == name:
                    yield statement

    def references(self) -> list["ModelClass"]:
        """Model classes that the text of the class or of its bases names, in order."""
        found = {
            known: None
            for one in self.line()
            for node in ast.walk(one.node)
            if isinstance(node, ast.Name) and (known := find_class(one.module, node.id)) is not None
        }
        return [known for known in found if known not in set(self.line())]

    def attributes(self) -> set[str]:
        """Names of all `self.<name> = …`."""
        return {
            target.attr
            for one in self.line()
            for node in ast.walk(one.node)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
        }

    def assigned(self, attribute: str) -> Iterator[tuple[str, str]]:
        """(module, name) of what is called in each `self.<attribute> = Name(…)`."""
        for one in self.line():
            for node in ast.walk(one.node):
                if (
                    isinstance(node, ast.Assign)
                    and ast.unparse(node.targets[0]) == f"self.{attribute}"
                    and isinstance(node.value, ast.Call)
                    and not ast.unparse(node.value.func).endswith("PPMissingLayer")
                ):
                    yield one.module, ast.unparse(node.value.func)


def find_class(module: str, name: str) -> ModelClass | None:
    """The class that `name` stands for in a module; None where it is no model class."""
    if name in _classes(module):
        return ModelClass(module, name)
    origin = imported_from(module, name)
    if origin is None or not origin[0].startswith(_MODELS):
        return None
    return find_class(*origin) if origin[0] != module else None


def imported_from(module: str, name: str) -> tuple[str, str] | None:
    """(module, name) that an import at a module's top binds to `name`."""
    return _imports(module).get(name)


def source_file(module: str) -> Path | None:
    """The file of a module of vLLM or transformers; None where there is none."""
    top, *inside = module.split(".")
    package = find_spec(top) if top in ("vllm", "transformers") else None
    if package is None or not package.submodule_search_locations:
        return None
    place = Path(package.submodule_search_locations[0], *inside)
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def _statements(module: str) -> list[ast.stmt]:
    file = source_file(module)
    return ast.parse(file.read_text(encoding="utf-8")).body if file else []


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _statements(module) if isinstance(node, ast.ClassDef)}


@cache
def _imports(module: str) -> dict[str, tuple[str, str]]:
    found = {}
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            # One dot is the module's own package.
            parents = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parents, node.module])
            for alias in node.names:
                found[alias.asname or alias.name] = (origin, alias.name)
    return found
