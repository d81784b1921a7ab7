"""vLLM's Model Runner V2 on a CPU, watched. A program: `python v2_on_cpu.py MODEL OPTIONS OUT`.

vLLM has this runner for the CPU (`vllm/v1/worker/cpu/model_runner.py`), but only with a Triton that
compiles for CPUs. Triton's interpreter runs the same kernels, so everything here is vLLM's own:
scheduler, request states, block tables, input batch, slot mappings. It needs a process of its own,
because both Triton and vLLM decide on import.

Writes JSON: for each step what the adapter told, and beside it what vLLM then made of the step.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from microedit_vllm.artifact import Decision, Scope
from tests.builders import tiny_manifest, tiny_sae

DECISION = Decision(statistic="relative", tau=0.5, scope=Scope(last=16, run=4), max_norm=1e9)
MANIFEST = tiny_manifest(tiny_sae(), decision=DECISION)


def use_v2(plugins: str = "") -> None:
    """Make vLLM choose Model Runner V2 here; before vLLM or Triton is imported."""
    os.environ.update(
        TRITON_INTERPRET="1",
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        HF_HUB_OFFLINE="1",
        VLLM_PLUGINS=plugins,
    )
    import triton.backends

    # Stands for a Triton that compiles for CPUs; nothing is compiled.
    triton.backends.backends["cpu"] = SimpleNamespace(
        driver=SimpleNamespace(is_active=lambda: True), compiler=None
    )
    _mend_masks()


def _mend_masks() -> None:
    """Let the interpreter take masks that numpy made whole numbers of (it refuses them)."""
    from triton.runtime.interpreter import InterpreterBuilder

    def with_bool_mask(method: Any, place: int) -> Any:
        def masked(self: Any, *args: Any) -> Any:
            args[place].data = args[place].data.astype(bool)
            return method(self, *args)

        return masked

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    InterpreterBuilder.create_masked_load = with_bool_mask(load, 1)
    InterpreterBuilder.create_masked_store = with_bool_mask(store, 2)


def schedule_asynchronously() -> None:
    """Undo that vLLM turns asynchronous scheduling off on CPUs."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = classmethod(check_and_update_config)


class Watch:
    """Attaches the adapter, and notes its steps beside vLLM's own numbers."""

    def __init__(self, runner: Any) -> None:
        from microedit_vllm.engine.runner_v2 import V2RunnerAdapter

        self.adapter = V2RunnerAdapter(runner, MANIFEST)
        self.runner = runner
        self.num_slots = self.adapter.num_slots()
        self.steps: list[dict[str, Any]] = []
        self.new: list[tuple[str, Any]] = []
        self.adapter.attach(self.on_step, self.on_new_request)
        self._prepare_attn = runner.prepare_attn
        runner.prepare_attn = self.prepare_attn

    def on_new_request(self, state: Any) -> None:
        self.new.append((state.request_id, state.plan and state.plan.edit_from))

    def on_step(self, step: Any) -> bool:
        told = []
        for request in step.requests:
            positions = range(request.first_position, request.first_position + request.num_rows)
            # Read now: the table must be final before the graph is chosen.
            row = step.block_table[request.index].tolist()
            size = step.block_size
            told.append(
                {
                    "id": request.state.request_id,
                    "edit_from": request.state.plan.edit_from,
                    "first_row": request.first_row,
                    "positions": list(positions),
                    "slots": [row[p // size] * size + p % size for p in positions],
                }
            )
        self.steps.append({"told": told, "real": {}, "known": sorted(self.adapter._states)})
        return bool(told)

    def prepare_attn(self, batch: Any) -> Any:
        tables, slot_mappings = self._prepare_attn(batch)
        starts = batch.query_start_loc.tolist()
        for place, request_id in enumerate(batch.req_ids):
            rows = slice(starts[place], starts[place + 1])
            self.steps[-1]["real"][request_id] = {
                "first_row": starts[place],
                "positions": batch.positions[rows].tolist(),
                "slots": slot_mappings[0, rows].tolist(),
                "prompt": int(self.runner.req_states.prompt_len.np[batch.idx_mapping_np[place]]),
                "prefill": int(batch.prefill_len_np[place]),
            }
        return tables, slot_mappings


def warm(worker: Any, watch: Watch) -> dict[str, Any]:
    """What is told of vLLM's warm-up, which runs made-up requests before the first real one."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    # Not `warmup_kernels`: some of its sampling kernels are beyond the interpreter.
    ways = (worker.model_runner, worker.execute_model, worker.sample_tokens)
    assert run_mixed_prefill_decode_warmup(*ways, num_tokens=16)
    told = [request for step in watch.steps for request in step["told"]]
    steps = len(watch.steps)
    watch.steps.clear()
    return {"steps": steps, "told": told, "new": list(watch.new)}


def generate(llm: Any) -> list[list[int]]:
    """More than the KV cache holds: the youngest requests are preempted and come back."""
    from vllm import SamplingParams

    prompts = ["the cat sat. " * 5, "a" * 9, "one two three four " * 3, "b c " * 12, "xyz" * 11]
    options = [None, None, {"microedit": "off"}, {"microedit_edit_from": 20}, None]
    params = [
        SamplingParams(temperature=0, max_tokens=60 + 7 * i, ignore_eos=True, extra_args=extra)
        for i, extra in enumerate(options)
    ]
    outputs = llm.generate(prompts, params)
    # The first prompt again, twice: the second time its blocks are in the prefix cache.
    for _ in range(2):
        llm.generate(prompts[0], SamplingParams(max_tokens=1))
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(model: str, options: dict[str, Any], out: Path) -> None:
    use_v2()
    from vllm import LLM

    if options.pop("asynchronous", False):
        schedule_asynchronously()
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=40,
        block_size=32,
        num_gpu_blocks_override=12,
        **options,
    )
    worker = llm.llm_engine.model_executor.driver_worker.worker
    watch = Watch(worker.model_runner)
    warm_up = warm(worker, watch)
    texts = generate(llm)
    real = len(watch.steps)
    worker.model_runner._dummy_run(8)
    result = {
        "runner": type(worker.model_runner).__module__,
        "num_slots": watch.num_slots,
        "warm_up": warm_up,
        "texts": texts,
        "new": watch.new,
        "steps": watch.steps[:real],
        "dummy_steps": len(watch.steps) - real,
    }
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
