"""Invariants 1 to 3 under random schedules; `make soak` runs many more of them."""

from pathlib import Path

import pytest

from tests.microedit_vllm.engine.schedule_trace import REUSED_BLOCKS, check_seed
from tests.microedit_vllm.engine.tiny_served import TinyServed, tiny_served

FORMS = [
    ("delta", "window", "relative"),
    ("carried", "window", "relative"),
    ("replace", "last", "absolute"),
    ("sequence", "all", "absolute"),
]
QUICK, SOAK = 8, 100


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], TinyServed]:
    """The tiny model with an edit set of each form."""
    return {form: tiny_served(_folder(tmp_path_factory, form[0]), *form) for form in set(FORMS)}


def _folder(factory: pytest.TempPathFactory, name: str) -> Path:
    return factory.mktemp(name)


@pytest.mark.parametrize(
    "seed",
    [
        REUSED_BLOCKS,
        *range(QUICK),
        *(pytest.param(s, marks=pytest.mark.soak) for s in range(QUICK, SOAK)),
    ],
)
def test_no_schedule_breaks_an_invariant(served, seed, schedule_counts):
    report = check_seed(served[FORMS[max(seed, 0) % len(FORMS)]], seed)
    schedule_counts.update(report.counts)
    schedule_counts["violations"] += len(report.violations)
    assert report.violations == []
