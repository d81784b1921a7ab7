"""docs/architectures.md is what the code says."""

from pathlib import Path

from microedit_vllm.engine.architecture_table import PROVEN, table
from tests.tiny_architectures import CONFIGS

COMMITTED = Path(__file__).parents[3] / "docs" / "architectures.md"


def test_the_committed_table_is_the_generated_one():
    assert COMMITTED.read_text(encoding="utf-8") == table(), "write it anew, as it says at its top"


def test_what_the_table_calls_proven_is_what_the_tests_run():
    assert set(CONFIGS) == PROVEN
