"""The list of vLLM's names against the vLLM that is installed, read and imported."""

import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microedit_vllm.engine import compatibility
from microedit_vllm.engine.compatibility import changes_of, check_private_names
from microedit_vllm.engine.private_names import PRIVATE_NAMES, PrivateName
from microedit_vllm.engine.private_names.table import table
from microedit_vllm.engine.setup import _prepare
from microedit_vllm.errors import MicroEditError
from tests.test_imports import ROOT, imported, modules, within

ENGINE = ROOT / "microedit_vllm" / "engine"
DOTTED = re.compile(r"""["'](vllm(?:\.\w+)+)["']""")

# vLLM's version, and the name of a logger of ours.
NO_NAMES = {
    "vllm.__version__",
    "vllm.microedit",
    # Modules whose source `architectures` and `stream_form` read, each name checked there.
    "vllm.model_executor.models.registry",
    "vllm.model_executor.layers.layernorm",
}


def signature(name: PrivateName) -> tuple[str, ...] | None:
    """Parameters as Python sees them; None where it is no function."""
    found = reduce(getattr, name.name.split("."), importlib.import_module(name.module))
    if name.parameters is None:
        return None
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    # One that this package has wrapped in another test, as vLLM made it.
    found = getattr(found, "microedit_original", found)
    parameters = inspect.signature(found).parameters.values()
    return tuple(
        stars.get(each.kind, "") + each.name for each in parameters if each.name not in ("self",)
    )


def test_vllm_has_every_name_as_described():
    """One failure that lists all that changed: what a new release of vLLM breaks."""
    changes = [change for each in PRIVATE_NAMES for change in changes_of(each, exact=True)]
    assert changes == []


def test_every_name_can_be_imported_and_called_as_described():
    # In a process of its own: importing a CPU worker changes torch, and plugins wrap names.
    check = (
        "from tests.microedit_vllm.engine.test_private_names import differences;"
        "found = differences(); print(*found, sep='\\n'); raise SystemExit(bool(found))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]


def differences() -> list[str]:
    found = []
    for each in PRIVATE_NAMES:
        try:
            parameters = signature(each)
        except Exception as error:
            found.append(f"{each.module}.{each.name}: {error!r}")
        else:
            if parameters != each.parameters:
                found.append(f"{each.module}.{each.name}: {parameters}")
    return found


def test_every_import_of_vllm_is_on_the_list():
    listed = {f"{each.module}.{each.name}" for each in PRIVATE_NAMES}
    packages = {each.module for each in PRIVATE_NAMES}
    packages |= {module.rpartition(".")[0] for module in packages}
    used = set()
    for path in modules(ENGINE):
        if path.parent.name == "private_names":
            continue
        used |= {name for name in imported(path) if within(name, "vllm")}
        # Names that are imported later, by a string.
        used |= set(DOTTED.findall(path.read_text(encoding="utf-8")))
    assert "vllm.v1.worker.cpu_worker.CPUWorker" in used
    assert sorted(used - listed - packages - NO_NAMES) == []


def test_the_list_names_modules_of_ours():
    ours = {path.stem for path in modules(ENGINE)}
    assert {user for each in PRIVATE_NAMES for user in each.used_by.split()} <= ours


def test_the_documented_table_is_the_list():
    command = "python -m microedit_vllm.engine.private_names > docs/private_names.md"
    committed = Path(ROOT / "docs" / "private_names.md").read_text(encoding="utf-8")
    assert committed == table(), f"run `{command}`"


FUNCTION = next(each for each in PRIVATE_NAMES if each.name.endswith("from_cli_args"))
CLASS = next(each for each in PRIVATE_NAMES if each.name == "GPUModelRunner")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (replace(FUNCTION, module="vllm.no_such_module"), "vllm.no_such_module is gone"),
        (replace(FUNCTION, module="vllm.no.such"), "vllm.no.such is gone"),
        (replace(FUNCTION, name="EngineArgs.no_such"), "EngineArgs.no_such is gone"),
        (replace(FUNCTION, parameters=("args", "other")), r"takes \(args\), not \(args, other\)"),
        (replace(CLASS, attributes=("input_batch", "lost", "too")), "has no lost, too"),
        (replace(CLASS, parameters=()), "is no function"),
    ],
)
def test_each_kind_of_change_is_named(name: Any, change: str):
    (found,) = changes_of(name)
    assert re.search(change, found)


def test_a_new_parameter_counts_in_the_test_but_not_at_start():
    fewer = replace(FUNCTION, parameters=())
    assert changes_of(fewer) == []
    assert changes_of(fewer, exact=True) != []


def test_the_server_looks_before_anything_else(monkeypatch):
    monkeypatch.setattr(compatibility, "PRIVATE_NAMES", [replace(CLASS, module="vllm.gone")])
    setting = {"microedit": {"edit_set": "no folder"}}
    config = SimpleNamespace(additional_config=setting, use_v2_model_runner=False)
    with pytest.raises(MicroEditError, match=r"vllm\.gone is gone"):
        _prepare(config, announce=False)


@pytest.mark.parametrize("use_v2", [False, True])
def test_at_start_all_changes_of_the_own_runner_are_one_line(monkeypatch, use_v2):
    check_private_names(use_v2)
    broken = [replace(each, module="vllm.gone") for each in PRIVATE_NAMES]
    monkeypatch.setattr(compatibility, "PRIVATE_NAMES", broken)
    with pytest.raises(MicroEditError, match=r"vLLM 0\.\d+") as caught:
        check_private_names(use_v2)
    own = [each for each in PRIVATE_NAMES if each.runner in (None, "v2" if use_v2 else "v1")]
    assert len(own) < len(PRIVATE_NAMES)
    assert str(caught.value).count("is gone") == len(own)
    assert "\n" not in str(caught.value)
    assert "supports vLLM 0.32" in str(caught.value)
