"""The house: imports run downwards only, and vLLM is known in one folder."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "microedit_kernels"
SERVING = ROOT / "microedit_vllm"
TRAINER = ROOT / "trainer" / "microedit_trainer"
# What the top floor may never touch of the middle one: these know vLLM.
KNOWS_VLLM = ("microedit_vllm.engine", "microedit_vllm.plugin", "microedit_vllm.config")


def modules(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"{folder} has moved; this test looks at nothing"
    return found


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, `from a import b` as a and as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif _is_import_call(node):
            yield node.args[0].value


def _is_import_call(node: ast.AST) -> bool:
    """importlib.import_module("a.b") and __import__("a.b"): imports too."""
    if not isinstance(node, ast.Call) or not node.args:
        return False
    name = ast.unparse(node.func).split(".")[-1]
    first = node.args[0]
    return (
        name in ("import_module", "__import__")
        and isinstance(first, ast.Constant)
        and isinstance(first.value, str)
    )


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(folder: Path, *forbidden: str, but: tuple[Path, ...] = ()) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        if not any(path == spared or spared in path.parents for spared in but)
        for name in imported(path)
        if within(name, *forbidden)
    ]


def test_kernels_import_nothing_of_the_floors_above():
    assert offences(KERNELS, "microedit_vllm", "microedit_trainer", "vllm", "transformers") == []


def test_serving_does_not_import_the_trainer():
    assert offences(SERVING, "microedit_trainer") == []


def test_the_artifact_knows_neither_engine_nor_command_line():
    assert offences(SERVING / "artifact", *KNOWS_VLLM, "microedit_vllm.cli", "vllm") == []


def test_the_trainer_imports_neither_vllm_nor_what_knows_it():
    assert offences(TRAINER, "vllm", *KNOWS_VLLM, "microedit_vllm.cli") == []


def test_vllm_is_imported_in_the_engine_folder_only():
    assert offences(SERVING, "vllm", but=(SERVING / "engine", SERVING / "plugin.py")) == []


@pytest.mark.parametrize(
    "name",
    [
        "microedit_vllm",
        "microedit_vllm.artifact",
        "microedit_vllm.cli.main",
        "microedit_vllm.cli.verify",
        "microedit_vllm.verification",
    ],
)
def test_importing_does_not_import_vllm(name):
    check = f"import sys, {name}; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("folder", [KERNELS, SERVING, TRAINER], ids=lambda folder: folder.name)
def test_no_module_is_named_after_nothing(folder):
    nameless = {"utils.py", "helpers.py", "manager.py", "util.py", "helper.py", "common.py"}
    assert [path.name for path in modules(folder) if path.name in nameless] == []


def test_the_parser_sees_every_kind_of_import(tmp_path):
    """The rules above mean nothing where an import goes unseen."""
    path = tmp_path / "module.py"
    path.write_text(
        "import vllm.config as c\n"
        "def f():\n"
        "    from microedit_vllm import engine\n"
        "    import importlib; importlib.import_module('microedit_trainer.x')\n"
    )
    found = set(imported(path))
    assert {"vllm.config", "microedit_vllm.engine", "microedit_trainer.x"} <= found
    assert within("vllm.config", "vllm")
    assert not within("vllm_cpu", "vllm")
