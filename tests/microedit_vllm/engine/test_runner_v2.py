"""The adapter for Model Runner V2, against what vLLM itself makes of each step.

The engines here are vLLM's V2 runner on the CPU (see `v2_on_cpu`). CUDA graphs are the one part
that needs a GPU; their choice does not, and is tested with vLLM's own classes.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu import cudagraph_utils, dp_utils

from microedit_vllm.engine.runner_v2 import _WARM_UP_ID, V2RunnerAdapter
from microedit_vllm.errors import MicroEditError
from tests.microedit_vllm.engine import edits_on_v2, v2_on_cpu
from tests.microedit_vllm.engine.tiny_served import TinyServed, tiny_served
from tests.microedit_vllm.engine.v2_on_cpu import MANIFEST
from tests.tiny_model import tiny_model

DRAFTS = 3
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"enable_prefix_caching": False},
    "asynchronous": {"asynchronous": True},
    "drafts": {
        "asynchronous": True,
        "speculative_config": {"method": "draft_model"},
        "enable_prefix_caching": False,
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Llama, and one that drafts for it and is right at times."""
    root = tmp_path_factory.mktemp("models")
    model = tiny_model(root / "model", hidden=128)
    draft = shutil.copytree(model, root / "draft")
    generator = torch.Generator().manual_seed(0)
    weights = load_file(model / "model.safetensors")
    for weight in weights.values():
        weight += 0.02 * torch.randn(weight.shape, generator=generator)
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    return model, draft


# `make soak` runs them all.
_OFTEN, *_LATER = MODES


@pytest.fixture(
    scope="module",
    params=[_OFTEN, *(pytest.param(mode, marks=pytest.mark.soak) for mode in _LATER)],
)
def run(request: Any, models: tuple[Path, Path], tmp_path_factory: Any) -> dict[str, Any]:
    """What one engine did with more requests than its KV cache holds."""
    options = json.loads(json.dumps(MODES[request.param]))
    if "speculative_config" in options:
        options["speculative_config"] |= {
            "model": str(models[1]),
            "num_speculative_tokens": DRAFTS,
        }
    out = tmp_path_factory.mktemp("run") / "out.json"
    command = [sys.executable, v2_on_cpu.__file__, str(models[0]), json.dumps(options), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {"mode": request.param, **json.loads(out.read_text())}


def shares(run: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(what the adapter told, what vLLM made of it) of each request in each step."""
    for step in run["steps"]:
        for told in step["told"]:
            yield told, step["real"][told["id"]]


def test_it_is_model_runner_v2(run):
    assert run["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert run["num_slots"] == 12 * 32


def test_the_run_has_all_that_is_asked_of_the_adapter(run):
    """Chunks, decodes, reorders, a prefix hit, requests that come back with generated tokens."""
    real = [share for step in run["steps"] for share in step["real"].values()]
    chunks = [share for share in real if share["positions"][-1] < share["prompt"] - 1]
    assert chunks
    assert any(share["positions"][0] >= share["prefill"] for share in real)
    resumed = [share for share in real if share["prefill"] > share["prompt"]]
    assert resumed, "no request was preempted"
    if run["mode"] == "asynchronous":
        # The last request is the one before again, found in the prefix cache but for a token.
        assert real[-1]["positions"][0] == 64
    else:
        assert min(share["positions"][0] for share in resumed) == 0
    orders = [[id_ for id_ in step["real"]] for step in run["steps"]]
    assert any(
        (sorted(before) == sorted(after) and before != after)
        or [id_ for id_ in before if id_ in after] != [id_ for id_ in after if id_ in before]
        for before, after in pairwise(orders)
    )


def test_each_step_names_all_requests_with_edits_in_the_batch_s_order(run):
    off = {request_id for request_id, edit_from in run["new"] if edit_from is None}
    assert len(off) == 1
    for step in run["steps"]:
        wanted = [request_id for request_id in step["real"] if request_id not in off]
        assert [told["id"] for told in step["told"]] == wanted


def test_rows_are_those_of_the_batch(run):
    for told, real in shares(run):
        assert told["first_row"] == real["first_row"]
        assert len(told["positions"]) == len(real["positions"])


def test_up_to_token_e_positions_and_slots_are_exact(run):
    exact = 0
    for told, real in shares(run):
        if real["positions"][0] <= told["edit_from"]:
            assert told["positions"] == real["positions"]
            assert told["slots"] == real["slots"]
            exact += 1
    assert exact >= 5


def test_behind_token_e_positions_stay_behind_it(run):
    ahead = 0
    for told, real in shares(run):
        if real["positions"][0] > told["edit_from"]:
            assert told["positions"][0] >= real["positions"][0]
            ahead += told["positions"] != real["positions"]
    # Rejected drafts: without them the host's count is exact, too.
    assert (ahead > 0) == (run["mode"] == "drafts")


def test_a_request_is_planned_once_by_its_prompt_alone(run):
    ids = [request_id for request_id, _ in run["new"]]
    assert len(ids) == len(set(ids)) == 7
    assert 20 in [edit_from for _, edit_from in run["new"]]
    for told, real in shares(run):
        assert told["edit_from"] in (20, real["prompt"] - 1)


def test_finished_requests_are_forgotten(run):
    assert run["steps"][0]["known"]
    last = list(run["steps"][-1]["real"])
    assert run["steps"][-1]["known"] == sorted(last)


def test_a_dummy_step_is_not_told(run):
    assert run["dummy_steps"] == 0


def test_nothing_is_told_of_made_up_requests(run):
    assert run["warm_up"]["steps"] == 2
    assert run["warm_up"]["told"] == []
    assert run["warm_up"]["new"] == []


def test_the_runner_s_answers_are_right(run, models):
    """Or the steps above would be none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(models[0])("the cat sat. " * 5, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    limits = {"min_new_tokens": 16, "max_new_tokens": 16}
    expected = model.generate(**prompt, do_sample=False, **limits)[0, -16:].tolist()
    assert run["texts"][0][:16] == expected
    assert [len(text) for text in run["texts"]] == [60 + 7 * i for i in range(5)]


@pytest.mark.parametrize(
    ("request_id", "is_warm_up"),
    [
        ("_warmup_0_", True),
        ("_v2_mixed_warmup_decode_", True),
        ("_sparse_mla_v2_warmup_prefill_", True),
        ("cmpl-0-0a1b2c3d", False),
        ("_warmup_0_-0a1b2c3d", False),
    ],
)
def test_made_up_ids_are_told_from_real_ones(request_id, is_warm_up):
    assert bool(_WARM_UP_ID.fullmatch(request_id)) is is_warm_up


# --- The adapter alone. The runner is a stand-in: vLLM's own takes an engine to build. ---


def new_request(tokens: list[int], id_: str = "a-0a1b2c3d", **extra: Any) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    data = NewRequestData(
        req_id=id_,
        prompt_token_ids=tokens,
        mm_features=[],
        sampling_params=SamplingParams(extra_args=extra or None),
        pooling_params=None,
        block_ids=([1],),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=[*tokens, 7, 8],
    )
    output.scheduled_new_reqs = [data]
    return output


def stand_in(**changes: Any) -> Any:
    defaults = {
        "adaptive_verification": None,
        "pcp_manager": None,
        "ubatch_runner": None,
        "fast_prefill": None,
        "dcp_size": 1,
        "dp_size": 1,
        "model_state": SimpleNamespace(num_new_sampled_tokens_per_step=1),
        "cudagraph_manager": SimpleNamespace(_candidates={}, dispatch=None, use_breakable_cg=False),
        "finish_requests": lambda scheduler_output: None,
        "add_requests": lambda scheduler_output: None,
        "gather_batch_req_state": lambda scheduler_output, dummy_run: (None, None),
    }
    return SimpleNamespace(**{**defaults, **changes})


def attached(runner: Any) -> list[Any]:
    """Attach to a stand-in; the states of new requests as they come."""
    new: list[Any] = []
    V2RunnerAdapter(runner, MANIFEST).attach(lambda step: False, new.append)
    return new


def test_a_resumed_request_keeps_its_record():
    runner = stand_in()
    new = attached(runner)
    runner.add_requests(new_request([1, 2, 3]))
    preempted = SchedulerOutput.make_empty()
    preempted.preempted_req_ids = {"a-0a1b2c3d"}
    runner.finish_requests(preempted)
    runner.add_requests(new_request([1, 2, 3]))
    assert [state.plan.edit_from for state in new] == [2]


def test_an_id_that_comes_again_after_its_end_is_another_request():
    runner = stand_in()
    new = attached(runner)
    runner.add_requests(new_request([1, 2, 3]))
    finished = SchedulerOutput.make_empty()
    finished.finished_req_ids = {"a-0a1b2c3d"}
    runner.finish_requests(finished)
    runner.add_requests(new_request([1, 2, 3]))
    assert len(new) == 2


def test_a_request_that_streams_its_input_is_planned_anew():
    runner = stand_in()
    new = attached(runner)
    runner.add_requests(new_request([1, 2, 3]))
    runner.add_requests(new_request([1, 2, 3, 4, 5]))
    assert [state.plan.edit_from for state in new] == [2, 4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"adaptive_verification": object()}, "adaptive verification"),
        ({"pcp_manager": object()}, "prefill context parallelism"),
        ({"dcp_size": 2}, "decode context parallelism"),
        ({"ubatch_runner": object()}, "--enable-dbo"),
        ({"fast_prefill": object()}, "--kv-sharing-fast-prefill"),
        ({"model_state": SimpleNamespace(num_new_sampled_tokens_per_step=0)}, "diffusion"),
    ],
)
def test_what_lays_rows_out_in_another_way_is_refused(change, reason):
    with pytest.raises(MicroEditError, match=reason):
        attached(stand_in(**change))


def graph_config() -> Any:
    """For vLLM's own choice of a CUDA graph, among graphs that nobody captured."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.NONE,
            cudagraph_capture_sizes=[1, 2, 4, 8, 16],
            max_cudagraph_capture_size=16,
            compile_sizes=[],
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        speculative_config=None,
        lora_config=None,
        num_speculative_tokens=0,
    )


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`CudaGraphManager` with FULL graphs for decodes and piecewise ones for the rest."""
    first = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: first)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    built = cudagraph_utils.CudaGraphManager(
        graph_config(), torch.device("cpu"), CUDAGraphMode.FULL_AND_PIECEWISE, decode_query_len=1
    )
    built._graphs_captured = True
    return built


def guarded(manager: Any, verdicts: list[bool], dp_size: int = 1) -> Any:
    """A runner whose `on_step` answers with `verdicts`; `gather` begins a step."""
    empty = SimpleNamespace(req_ids=[], num_scheduled_tokens=torch.zeros(0).int().numpy())
    empty.idx_mapping_np = empty.num_scheduled_tokens
    runner = stand_in(
        cudagraph_manager=manager,
        dp_size=dp_size,
        gather_batch_req_state=lambda output, dummy_run: (None if dummy_run else empty, None),
        req_states=SimpleNamespace(num_computed_tokens_np=empty.num_scheduled_tokens),
        block_tables=SimpleNamespace(block_tables=[SimpleNamespace(gpu=None)], block_sizes=[32]),
    )
    answers = iter(verdicts)
    V2RunnerAdapter(runner, MANIFEST).attach(lambda step: next(answers), lambda state: None)
    return runner


DECODE = {"num_reqs": 3, "num_tokens": 3, "uniform_token_count": 1, "num_active_loras": 0}


def test_a_step_that_must_not_runs_in_no_graph_and_only_that_step(manager):
    runner = guarded(manager, [False, True, True, False])
    output = SchedulerOutput.make_empty()
    modes = []
    for dummy_run in (False, False, True, False, False):
        runner.gather_batch_req_state(output, dummy_run)
        modes.append(manager.dispatch(**DECODE).cg_mode)
    full, none = CUDAGraphMode.FULL, CUDAGraphMode.NONE
    assert modes == [full, none, full, none, full]


@pytest.mark.parametrize("refuses", [False, True])
def test_ranks_with_data_parallelism_agree(manager, monkeypatch, refuses):
    """The other rank wants its FULL graph; the exchange between processes is played."""
    runner = guarded(manager, [refuses], dp_size=2)
    runner.gather_batch_req_state(SchedulerOutput.make_empty(), False)

    def all_reduce(tensor: torch.Tensor, group: Any) -> None:
        tensor[:, 1] = torch.tensor([3, CUDAGraphMode.FULL.value, 1, 1, 0, 3])

    monkeypatch.setattr(dp_utils, "get_dp_group", lambda: SimpleNamespace(cpu_group=None))
    monkeypatch.setattr(dp_utils, "should_skip_dp_coordination", lambda: False)
    monkeypatch.setattr(dp_utils.dist, "all_reduce", all_reduce)
    chosen, agreed = dp_utils.dispatch_cg_and_sync_dp(
        manager, 3, 3, 1, dp_size=2, dp_rank=0, max_query_len=1
    )
    assert agreed.eager is refuses
    assert chosen.cg_mode == (CUDAGraphMode.NONE if refuses else CUDAGraphMode.FULL)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> TinyServed:
    return tiny_served(tmp_path_factory.mktemp("served"))


def test_edits_are_served_as_a_whole_sequence_forward_gives_them(served, tmp_path):
    """On, off and declining requests in one batch, their prompts cut into chunks."""
    asked = [
        *((prompt, True) for prompt in served.edited[1:4]),
        *((prompt, True) for prompt in served.unrelated[3:5]),
        (served.edited[1], False),
    ]
    out = tmp_path / "out.json"
    requests = json.dumps([[prompt, edits] for prompt, edits in asked])
    command = [sys.executable, edits_on_v2.__file__, served.model, served.edit_set, requests, out]
    subprocess.run(list(map(str, command)), check=True, timeout=400)
    found = json.loads(out.read_text())
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    for (prompt, edits), tokens, record in zip(
        asked, found["tokens"], found["decisions"], strict=True
    ):
        wanted = served.answer(prompt, len(tokens), edits)
        assert record["on"] is wanted.on
        if edits:
            assert record["ard"] == pytest.approx(wanted.ard, rel=1e-3)
        assert tuple(tokens) == wanted.tokens
