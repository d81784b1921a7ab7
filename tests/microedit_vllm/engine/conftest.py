"""Fixtures around the made-up edit set in `synthetic.py`."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder
from tests.microedit_vllm.engine.synthetic import ENGINE_ENV, Residuals, make_edit_set


@pytest.fixture(scope="session")
def residuals(smollm2: Path) -> Residuals:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    return Residuals(AutoTokenizer.from_pretrained(smollm2), model.eval())


@pytest.fixture(scope="session")
def edit_set(smollm2: Path, residuals: Residuals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a set that fires on `EDITED` and on none of `UNRELATED`."""
    return make_edit_set(smollm2, residuals, tmp_path_factory.mktemp("edits"))


@pytest.fixture(scope="session")
def operator(edit_set: Path) -> EditOperator:
    loaded = EditSet.load(edit_set)
    return EditOperator.build(loaded, SparseAutoencoder.load(loaded.sae_folder(edit_set)))


@pytest.fixture
def copied_set(edit_set: Path, tmp_path: Path) -> Path:
    """A copy, with its SAE beside it, to do harm to."""
    shutil.copytree(edit_set.parent, tmp_path / "copy")
    return tmp_path / "copy" / edit_set.name


@pytest.fixture(scope="session", autouse=True)
def engine_environment() -> Iterator[None]:
    """Settings that every engine on a shared CPU host needs."""
    before = dict(os.environ)
    os.environ.update(ENGINE_ENV)
    yield
    os.environ.clear()
    os.environ.update(before)


_COUNTS = pytest.StashKey[Counter[str]]()
_MUTATIONS = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: starts an engine that compiles for minutes")
    config.addinivalue_line("markers", "soak: left to `make soak`")
    config.stash[_COUNTS] = Counter()
    config.stash[_MUTATIONS] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long ones to `make soak`, which asks for them with `-m`."""
    if "soak" not in config.option.markexpr:
        later = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in later]
        config.hook.pytest_deselected(items=later)


@pytest.fixture(scope="session")
def schedule_counts(pytestconfig: pytest.Config) -> Counter[str]:
    """What the random schedules covered; told at the end."""
    return pytestconfig.stash[_COUNTS]


@pytest.fixture(scope="session")
def mutations_seen(pytestconfig: pytest.Config) -> dict[str, str]:
    """What saw each planted fault; told at the end."""
    return pytestconfig.stash[_MUTATIONS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts, mutations = config.stash[_COUNTS], config.stash[_MUTATIONS]
    if counts:
        terminalreporter.section("random schedules")
        for name, count in counts.items():
            terminalreporter.line(f"{count:8d} {name}")
    if mutations:
        terminalreporter.section("planted faults")
        for name, seen in mutations.items():
            terminalreporter.line(f"{name:45} {seen}")
