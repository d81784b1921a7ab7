"""Every name of vLLM's insides that this package relies on, in one list; imports no vLLM.

`compatibility` compares the list with the vLLM that is installed. `docs/private_names.md` is made
of it: `python -m microedit_vllm.engine.private_names > docs/private_names.md`.
"""

from dataclasses import dataclass

SUPPORTED = "0.32"


@dataclass(frozen=True)
class PrivateName:
    """A function, class or method of vLLM.

    Attributes:
        module, name: where it is defined (a class's method as `Class.method`).
        used_by: our modules in `microedit_vllm/engine`, separated by a blank.
        purpose: what for.
        parameters: of a function, without self and cls, with the stars; None for a class.
        attributes: of a class: what we read, write or call of its objects.
    """

    module: str
    name: str
    used_by: str
    purpose: str
    parameters: tuple[str, ...] | None = None
    attributes: tuple[str, ...] = ()

    @property
    def runner(self) -> str | None:
        """The model runner that the name belongs to, "v1" or "v2"; None for both."""
        used = set(self.used_by.split())
        return {("runner_v1",): "v1", ("runner_v2",): "v2"}.get(tuple(sorted(used)))


def _function(place: str, parameters: str, used_by: str, purpose: str) -> PrivateName:
    module, name = place.split(":")
    return PrivateName(module, name, used_by, purpose, tuple(parameters.split()))


def _name(place: str, attributes: str, used_by: str, purpose: str) -> PrivateName:
    module, name = place.split(":")
    return PrivateName(module, name, used_by, purpose, None, tuple(attributes.split()))


_SERVER = (
    _name("vllm:EngineArgs", "", "setup", "the class that is patched, as users import it"),
    _function("vllm.engine.arg_utils:EngineArgs.add_cli_args", "parser", "setup", "add the flags"),
    _function("vllm.engine.arg_utils:EngineArgs.from_cli_args", "args", "setup", "read the flags"),
    _function(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "usage_context headless",
        "setup",
        "check the setting, name our worker and scheduler",
    ),
    _name(
        "vllm.engine.arg_utils:EngineArgs",
        "additional_config _api_process_rank",
        "setup",
        "carry the setting; announce it once",
    ),
    _name(
        "vllm.config.vllm:VllmConfig",
        "additional_config model_config parallel_config scheduler_config kv_transfer_config "
        "use_v2_model_runner",
        "setup frontend scheduler worker",
        "read the setting, refuse what does not work with edits",
    ),
    _name(
        "vllm.config.parallel:ParallelConfig",
        "worker_cls decode_context_parallel_size enable_dbo",
        "setup",
        "name our worker",
    ),
    _name(
        "vllm.config.scheduler:SchedulerConfig",
        "scheduler_cls async_scheduling",
        "setup",
        "name our scheduler",
    ),
    _name(
        "vllm.config.model:ModelConfig",
        "model revision served_model_name runner_type get_hidden_size get_total_num_hidden_layers",
        "setup",
        "compare the model with the edit set's",
    ),
    _function("vllm.logger:init_logger", "name", "setup", "announce the edit set"),
    _name("vllm.exceptions:VLLMValidationError", "", "frontend", "a bad option is HTTP 400"),
    _function(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "request_id prompt params supported_tasks arrival_time lora_request tokenization_kwargs trace_headers priority data_parallel_rank resumable session_id kv_hints",
        "frontend",
        "check a request's options where it enters",
    ),
    _name(
        "vllm.v1.engine.input_processor:InputProcessor",
        "vllm_config",
        "frontend",
        "find the setting",
    ),
    _function(
        "vllm.v1.engine.input_processor:InputProcessor.assign_request_id",
        "request",
        "records runner_v2",
        "the random tail of a request's id",
    ),
    _function(
        "vllm.v1.engine.parallel_sampling:ParentRequest.get_child_info",
        "index",
        "records",
        "the number before the id of each of n samples",
    ),
    _name(
        "vllm.v1.engine:EngineCoreRequest",
        "prompt_token_ids sampling_params",
        "frontend",
        "a request's tokens and options",
    ),
    _name(
        "vllm.sampling_params:SamplingParams",
        "extra_args",
        "frontend scheduler runner_v1 runner_v2",
        "a request's options (`vllm_xargs`)",
    ),
    _name(
        "vllm.entrypoints.launchers.app:register_api_routers", "", "frontend", "where it is called"
    ),
    _function(
        "vllm.entrypoints.launchers.api_server.routers:register_api_routers",
        "args app supported_tasks model_config",
        "frontend",
        "add our routes",
    ),
    _function(
        "vllm.entrypoints.llm:LLM.collective_rpc",
        "method timeout args kwargs",
        "records",
        "read decisions offline",
    ),
    _function(
        "vllm.engine.protocol:EngineClient.collective_rpc",
        "method timeout args kwargs",
        "routes",
        "read decisions",
    ),
)
_SCHEDULER = (
    _name(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "kv_cache_manager vllm_config",
        "scheduler",
        "the base of our scheduler",
    ),
    _name(
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "",
        "scheduler",
        "the base of our scheduler",
    ),
    _function(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        "request",
        "scheduler",
        "shorten prefix hits",
    ),
    _function(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks_for_connector",
        "request",
        "scheduler",
        "shorten prefix hits",
    ),
    _name(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "coordinator",
        "scheduler",
        "find what stores blocks",
    ),
    _function(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
        "request num_computed_tokens",
        "scheduler",
        "store no block from token e on",
    ),
    _name(
        "vllm.v1.request:Request",
        "num_tokens prompt_token_ids sampling_params",
        "scheduler",
        "plan a request",
    ),
)
_WORKER = (
    _function(
        "vllm.utils.import_utils:resolve_obj_by_qualname",
        "qualname",
        "worker",
        "import the worker's base",
    ),
    _name("vllm.v1.worker.cpu_worker:CPUWorker", "", "worker", "the base of our worker on CPUs"),
    _name(
        "vllm.v1.worker.gpu_worker:Worker",
        "model_runner",
        "worker",
        "the base of our worker on GPUs",
    ),
    _function(
        "vllm.v1.worker.gpu_worker:Worker.load_model",
        "load_dummy_weights",
        "worker",
        "load the edit set, patch the layer",
    ),
    _function(
        "vllm.v1.worker.gpu_worker:Worker.initialize_from_config",
        "kv_cache_config",
        "worker",
        "size the state beside the KV cache",
    ),
    _function("vllm.forward_context:get_forward_context", "", "layer_patch", "find the step"),
    _function(
        "vllm.forward_context:is_forward_context_available", "", "layer_patch", "find the step"
    ),
    _name(
        "vllm.forward_context:ForwardContext",
        "additional_kwargs",
        "layer_patch",
        "carry the step to the layer",
    ),
    _name(
        "vllm.model_executor.models.utils:PPMissingLayer",
        "",
        "layer_patch",
        "a layer that another rank holds",
    ),
    _name(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "",
        "kv_group",
        "a KV group that keeps all tokens",
    ),
    _name("vllm.v1.kv_cache_interface:KVCacheSpec", "block_size", "kv_group", "count KV slots"),
    _name(
        "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
        "kv_cache_specs",
        "kv_group",
        "a group of layers with sizes of their own",
    ),
    _name(
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
        "kv_cache_spec",
        "kv_group",
        "a group's kind of attention",
    ),
    _name(
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        "num_blocks kv_cache_groups",
        "kv_group",
        "count KV slots",
    ),
)
_V1_RUNNER = (
    _name(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "kv_cache_config input_batch query_start_loc requests cudagraph_dispatcher",
        "runner_v1",
        "a step's requests",
    ),
    _function(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
        "input_ids positions intermediate_tensors inputs_embeds **model_kwargs",
        "runner_v1",
        "the forward call of real steps",
    ),
    _name(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "req_ids num_computed_tokens_cpu block_table",
        "runner_v1",
        "order and positions",
    ),
    _name(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "prompt_token_ids sampling_params",
        "runner_v1",
        "plan a request",
    ),
    _name(
        "vllm.v1.worker.block_table:MultiGroupBlockTable",
        "__getitem__",
        "runner_v1",
        "the block table of a KV group",
    ),
    _name(
        "vllm.v1.worker.block_table:BlockTable",
        "block_size block_table",
        "runner_v1",
        "KV slots of a request",
    ),
    _name("vllm.v1.utils:CpuGpuBuffer", "np", "runner_v1", "host copies"),
    _function(
        "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch",
        "num_tokens uniform_decode has_lora num_active_loras valid_modes invalid_modes",
        "runner_v1",
        "keep a step out of FULL CUDA graphs",
    ),
    _function(
        "vllm.compilation.breakable_cudagraph:is_breakable_cudagraph_enabled",
        "",
        "runner_v1",
        "graphs that are not cut at our operator",
    ),
    _name(
        "vllm.config.compilation:CUDAGraphMode",
        "FULL PIECEWISE",
        "runner_v1 runner_v2",
        "kinds of CUDA graph",
    ),
)
_V2 = "vllm.v1.worker.gpu"
_V2_RUNNER = (
    _function(
        f"{_V2}.model_runner:GPUModelRunner.finish_requests",
        "scheduler_output",
        "runner_v2",
        "drop finished requests",
    ),
    _function(
        f"{_V2}.model_runner:GPUModelRunner.add_requests",
        "scheduler_output",
        "runner_v2",
        "plan new requests",
    ),
    _function(
        f"{_V2}.model_runner:GPUModelRunner.gather_batch_req_state",
        "scheduler_output dummy_run",
        "runner_v2",
        "the moment before a step's CUDA graph is chosen",
    ),
    _name(
        f"{_V2}.model_runner:GPUModelRunner",
        "kv_cache_config req_states block_tables cudagraph_manager model_state dp_size "
        "dcp_size pcp_manager ubatch_runner fast_prefill adaptive_verification",
        "runner_v2",
        "a step's requests; refuse what lays rows out in another way",
    ),
    _name(
        f"{_V2}.model_runner:BatchReqState",
        "req_ids num_scheduled_tokens idx_mapping_np",
        "runner_v2",
        "a step's order",
    ),
    _name(f"{_V2}.states:RequestState", "num_computed_tokens_np", "runner_v2", "positions"),
    _name(
        f"{_V2}.block_table:BlockTables",
        "block_tables block_sizes",
        "runner_v2",
        "KV slots of a request",
    ),
    _name(f"{_V2}.buffer_utils:StagedWriteTensor", "gpu", "runner_v2", "the block table itself"),
    _name(
        f"{_V2}.model_states.interface:ModelState",
        "num_new_sampled_tokens_per_step",
        "runner_v2",
        "tell diffusion models",
    ),
    _function(
        f"{_V2}.cudagraph_utils:CudaGraphManager.dispatch",
        "num_reqs num_tokens uniform_token_count num_active_loras max_query_len num_ubatches",
        "runner_v2",
        "keep a step out of FULL CUDA graphs",
    ),
    _name(
        f"{_V2}.cudagraph_utils:CudaGraphManager",
        "_candidates use_breakable_cg",
        "runner_v2",
        "keep a step out of FULL CUDA graphs",
    ),
    _name(
        f"{_V2}.cudagraph_utils:BatchExecutionDescriptor",
        "cg_mode",
        "runner_v2",
        "the kind of a CUDA graph",
    ),
    _name(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "finished_req_ids scheduled_new_reqs",
        "runner_v2",
        "new and finished requests",
    ),
    _name(
        "vllm.v1.core.sched.output:NewRequestData",
        "req_id prompt_token_ids sampling_params",
        "runner_v2",
        "plan a request",
    ),
)
PRIVATE_NAMES = (*_SERVER, *_SCHEDULER, *_WORKER, *_V1_RUNNER, *_V2_RUNNER)


def table() -> str:
    """The list as Markdown, the whole of `docs/private_names.md`."""
    lines = [
        "# What we use of vLLM's insides",
        "",
        f"Made from `microedit_vllm/engine/private_names.py` for vLLM {SUPPORTED}. At start the "
        "server compares this list with the vLLM that is installed, and refuses to serve edits "
        "where something is gone; `tests/microedit_vllm/engine/test_private_names.py` compares "
        "every parameter and lists all that changed.",
        "",
        "| vLLM's name | parameters, or attributes | our module | what for |",
        "|---|---|---|---|",
    ]
    for each in PRIVATE_NAMES:
        if each.parameters is None:
            details = ", ".join(f"`.{attribute}`" for attribute in each.attributes)
        else:
            details = f"`({', '.join(each.parameters)})`"
        users = ", ".join(f"`{user}`" for user in each.used_by.split())
        lines.append(f"| `{each.module}.{each.name}` | {details} | {users} | {each.purpose} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
