import multiprocessing
import time

import psutil
import pytest

from benchmarks.offline_engine import OfflineEngine
from microedit_vllm.errors import MicroEditError


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(tmp_path):
    engine = OfflineEngine(str(tmp_path / "missing"), None, tmp_path / "log.txt")
    with pytest.raises(MicroEditError, match="missing") as raised, engine:
        pytest.fail("it started")
    assert "the last lines of its log" in str(raised.value)
    assert not multiprocessing.active_children()


def _work_and_wait():
    while time.process_time() < 0.5:
        pass
    time.sleep(60)


def test_cpu_time_of_its_processes_is_counted(tmp_path):
    own = psutil.Process().cpu_times()
    if own.user + own.system < 0.5 * time.process_time():
        pytest.skip("this machine does not tell a process's CPU time")
    engine = OfflineEngine(str(tmp_path), None, tmp_path / "log.txt")
    engine._process = multiprocessing.get_context("spawn").Process(target=_work_and_wait)
    engine._process.start()
    try:
        deadline = time.monotonic() + 30
        while engine.cpu_seconds() < 0.25 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0.25 <= engine.cpu_seconds() < 10
    finally:
        engine._process.kill()
        engine._process.join()
