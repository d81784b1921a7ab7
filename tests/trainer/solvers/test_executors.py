import multiprocessing
import os
import pickle
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from microedit_trainer.solvers import InProcess, Processes, RayCluster, executors
from microedit_vllm.errors import MicroEditError
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, no_progress, stored_prompts, tiny_problem

FEW = replace(JOINT.targets, steps=5)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As each worker has: another number would round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def batches(lm, sae):
    """Four, of two prompts each."""
    return stored_prompts(lm, sae, FACTS)


@pytest.fixture(scope="module")
def expected(lm, batches):
    return dict(InProcess().targets(lm, LAYER, FEW, batches))


def assert_the_same(found, expected):
    assert sorted(number for number, _ in found) == sorted(expected)
    for number, deltas in found:
        assert [d.shape for d in deltas] == [d.shape for d in expected[number]]
        for delta, wanted in zip(deltas, expected[number], strict=True):
            assert float((delta - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_two_workers_give_the_set_of_one_process(lm, sae, tmp_path):
    """And leave no process behind."""
    problem = tiny_problem(lm, sae, tmp_path / "one")
    alone = JOINT.solve(problem, no_progress)
    counted = []
    shared = replace(problem, work_folder=tmp_path / "two", executor=Processes(2))
    together = JOINT.solve(shared, counted.append)
    assert sum(counted) == 2 * len(FACTS)
    for name in ("scoring", "edit"):
        one, two = getattr(alone, name), getattr(together, name)
        assert torch.equal(one.indices, two.indices)
        torch.testing.assert_close(two.values, one.values, rtol=1e-5, atol=1e-5)
    assert together.theta == pytest.approx(alone.theta, rel=1e-5)
    assert multiprocessing.active_children() == []


def test_what_is_no_longer_wanted_ends_at_once(lm, batches, monkeypatch):
    """As on Ctrl-C: the worker is in the middle of a batch that never ends."""
    packed = [executors._pack(batches[0]), pickle.dumps(Sleeps())]
    monkeypatch.setattr(executors, "_pack", lambda batch: packed.pop(0))
    run = Processes(1).targets(lm, LAYER, FEW, batches[:2])
    next(run)
    run.close()
    assert multiprocessing.active_children() == []


class Sleeps:
    """Never arrives."""

    def __reduce__(self):
        return time.sleep, (3600,)


class Dies:
    """Ends the process that unpickles it, as the kernel does one that takes too much memory."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_worker_that_dies_is_one_clear_line(lm, batches, monkeypatch):
    monkeypatch.setattr(executors, "_pack", lambda batch: pickle.dumps(Dies()))
    with pytest.raises(MicroEditError, match=r"a worker died.*fewer --workers") as raised:
        list(Processes(1).targets(lm, LAYER, FEW, batches))
    assert "\n" not in str(raised.value)
    assert multiprocessing.active_children() == []


def test_no_more_batches_are_on_their_way_than_workers(batches):
    """Packed prompts take memory, thousands of batches of them too much."""
    futures = [Future(), Future(), Future()]
    submitted = []

    def submit(packed):
        submitted.append(pickle.loads(packed))
        return futures[len(submitted) - 1]

    run = executors._in_flight(submit, batches[:3], 2)
    futures[1].set_result(pickle.dumps(["second"]))
    assert next(run) == (1, ["second"])
    assert len(submitted) == 2
    futures[0].set_result(pickle.dumps(["first"]))
    assert next(run) == (0, ["first"])
    futures[2].set_result(pickle.dumps(["third"]))
    assert list(run) == [(2, ["third"])]
    assert [batch[0].tokens for batch in submitted] == [batch[0].tokens for batch in batches[:3]]


def test_without_ray_its_option_is_one_clear_line(lm, batches, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MicroEditError, match=r"pip install 'microedit-vllm\[ray\]'"):
        next(RayCluster().targets(lm, LAYER, FEW, batches))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:port"])
def test_a_cluster_that_does_not_answer_is_one_clear_line(lm, batches, monkeypatch, address):
    begun = []
    absent = SimpleNamespace(is_initialized=lambda: False, init=lambda **options: begun.append(1))
    monkeypatch.setitem(sys.modules, "ray", absent)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(MicroEditError, match=r"Ray does not start .*check RAY_ADDRESS"):
        next(RayCluster().targets(lm, LAYER, FEW, batches))
    assert begun == []


@pytest.mark.usefixtures("ray")
def test_a_ray_cluster_gives_the_targets_of_one_process(lm, batches, expected):
    assert_the_same(list(RayCluster(2).targets(lm, LAYER, FEW, batches)), expected)


@pytest.mark.usefixtures("ray")
def test_a_ray_worker_s_own_mistake_is_one_clear_line(lm, batches, tmp_path):
    elsewhere = replace(lm, name=str(tmp_path / "gone"), folder=tmp_path / "gone")
    with pytest.raises(MicroEditError, match="is not a model folder") as raised:
        list(RayCluster(2).targets(elsewhere, LAYER, FEW, batches))
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
