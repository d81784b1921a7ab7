"""Tensor and pipeline parallelism against one process: real ranks, real engines."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from microedit_vllm.engine.prefix_cache import EditPrefixCache
from microedit_vllm.engine.records import external_id
from tests.microedit_vllm.engine.schedule_trace import Ask, Run, random_trace, run_trace
from tests.microedit_vllm.engine.sharded_ranks import (
    CASES,
    SIZES,
    make_operator,
    results,
    run_ranks,
)
from tests.microedit_vllm.engine.tiny_served import TinyServed, tiny_served

ENGINE = {
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 60,
    "block_size": 32,
}
# Layers 0 and 1 are the first stage of two, 2 and 3 the last one.
FIRST_STAGE, LAST_STAGE = 1, 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    return run_ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_shares_of_the_latents_give_what_the_whole_gives(ranks, size, case):
    whole = results(make_operator(**CASES[case]), case)
    assert sum(found["latents"] for found in ranks[size]) == 47
    for found in ranks[size]:
        assert torch.equal(found[case]["indices"], whole["indices"])
        for name in ("acts", "deep", "dist", "dist0", "edited", "carried"):
            torch.testing.assert_close(found[case][name], whole[name])


def test_the_case_that_carries_carries_something():
    assert results(make_operator(**CASES["carried"]), "carried")["carried"].norm() > 0
    assert results(make_operator(**CASES["delta"]), "delta")["carried"].norm() == 0


def test_the_case_of_ties_has_ties_at_the_border_of_the_set():
    acts = results(make_operator(**CASES["ties"]), "ties")["acts"]
    assert (acts[:, -1] == acts[:, -2]).any()
    assert (acts[:, -1] > 0).any()


@pytest.mark.parametrize("size", SIZES)
def test_ranks_whose_sums_differ_in_a_bit_decide_as_the_first_one(ranks, size):
    assert [found["on"].tolist() for found in ranks[size]] == [[True, True]] * size


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_refuse_what_one_of_them_finds(ranks, size):
    for found in ranks[size]:
        assert "golden activations do not reproduce" in found["refusal"]


@dataclass(frozen=True)
class Trial:
    """One trace on one engine, and the decisions that reached the scheduler."""

    run: Run
    heard: dict[str, bool]


@pytest.fixture(scope="module")
def served_at(tmp_path_factory) -> Callable[[int], TinyServed]:
    return cache(lambda layer: tiny_served(tmp_path_factory.mktemp("served"), layer=layer))


@pytest.fixture(scope="module")
def trace(served_at) -> list[Ask]:
    """100 requests: edited, behind random text, unrelated, off, second turns, repetitions."""
    asks = random_trace(random.Random(0), served_at(LAST_STAGE), 100)
    return [replace(ask, count=min(ask.count, 8), abort=None, arrive=0) for ask in asks]


@pytest.fixture(scope="module")
def trial(served_at, trace) -> Callable[..., Trial]:
    def run(layer: int, **arguments: Any) -> Trial:
        heard: dict[str, bool] = {}
        decided = EditPrefixCache.decided

        def listen(self: Any, request: Any, on: bool | None) -> None:
            decided(self, request, on)
            if on is not None:
                heard[external_id(request.request_id)] = on

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EditPrefixCache, "decided", listen)
            found = run_trace(served_at(layer), {**ENGINE, **arguments}, trace, edits=True)
        return Trial(found, heard)

    return run


@pytest.fixture(scope="module")
def alone(trial) -> Callable[[int], Trial]:
    """One process, for each layer once."""
    return cache(trial)


def assert_same(trace: list[Ask], one: Run, other: Run) -> None:
    """The same decisions, ARD within 1e-3, and all tokens."""
    for ask in trace:
        record, found = one.decisions[ask.name], other.decisions[ask.name]
        if record["ard"] is not None:
            record = record | {"ard": pytest.approx(record["ard"], rel=1e-3)}
        assert found == record, ask
        for wanted, got in zip(one.samples[ask.name], other.samples[ask.name], strict=True):
            assert [token for token, _ in got] == [token for token, _ in wanted], ask


def expected_to_be_heard(trace: list[Ask], run: Run) -> dict[str, bool]:
    return {ask.name: run.decisions[ask.name]["on"] for ask in trace if ask.edits}


def test_the_trace_holds_what_it_should(trace, alone):
    run = alone(LAST_STAGE).run
    lengths = [len(ask.tokens) for ask in trace]
    assert min(lengths) <= 2
    assert max(lengths) > 150
    on = [ask for ask in trace if run.decisions[ask.name]["on"]]
    assert len(on) > 15
    assert sum(not ask.edits for ask in trace) > 10
    assert any(len(ask.tokens) > ENGINE["max_num_batched_tokens"] for ask in on)
    assert run.cached_tokens > 1000


def test_tensor_parallel_2(trace, alone, trial):
    one, other = alone(LAST_STAGE), trial(LAST_STAGE, tensor_parallel_size=2)
    assert_same(trace, one.run, other.run)
    assert other.run.schedule == one.run.schedule
    assert other.heard == one.heard == expected_to_be_heard(trace, one.run)


def test_pipeline_parallel_2_with_the_layer_on_the_last_stage(trace, alone, trial):
    one, other = alone(LAST_STAGE), trial(LAST_STAGE, pipeline_parallel_size=2)
    assert_same(trace, one.run, other.run)
    assert other.heard == one.heard


def test_pipeline_parallel_2_with_the_layer_on_the_first_stage(trace, alone, trial):
    """The scheduler hears the last stage, so it never learns of a decision."""
    one, other = alone(FIRST_STAGE), trial(FIRST_STAGE, pipeline_parallel_size=2)
    assert_same(trace, one.run, other.run)
    assert one.heard
    assert other.heard == {}


@pytest.fixture
def ray_on_cpu(monkeypatch) -> Iterator[None]:
    """A Ray of two devices that are CPUs: vLLM asks Ray for GPUs, and refuses its CPU platform."""
    ray = pytest.importorskip("ray")

    def name_device() -> None:
        from vllm.platforms import current_platform

        type(current_platform).ray_device_key = "GPU"

    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "ray_device_key", "GPU", raising=False)
    ray.init(
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        runtime_env={"worker_process_setup_hook": name_device},
    )
    yield
    ray.shutdown()


def test_tensor_parallel_2_on_ray(trace, alone, trial, ray_on_cpu):
    executor = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    one, other = alone(LAST_STAGE), trial(LAST_STAGE, **executor)
    assert_same(trace, one.run, other.run)
    assert other.heard == one.heard
