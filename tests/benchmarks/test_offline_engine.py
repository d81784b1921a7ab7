import multiprocessing

import pytest

from benchmarks.offline_engine import OfflineEngine
from microedit_vllm.errors import MicroEditError


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(tmp_path):
    engine = OfflineEngine(str(tmp_path / "missing"), None, tmp_path / "log.txt")
    with pytest.raises(MicroEditError, match="missing") as raised, engine:
        pytest.fail("it started")
    assert "the last lines of its log" in str(raised.value)
    assert not multiprocessing.active_children()
