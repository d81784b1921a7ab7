"""Names that the worker and the adapters of both model runners rely on."""

from microedit_vllm.engine.private_names.entry import function, named

WORKER = (
    function(
        "vllm.utils.import_utils:resolve_obj_by_qualname",
        "qualname",
        "worker",
        "import the worker's base",
    ),
    named("vllm.v1.worker.cpu_worker:CPUWorker", "", "worker", "the base of our worker on CPUs"),
    named(
        "vllm.v1.worker.gpu_worker:Worker",
        "model_runner",
        "worker",
        "the base of our worker on GPUs",
    ),
    function(
        "vllm.v1.worker.gpu_worker:Worker.load_model",
        "load_dummy_weights",
        "worker",
        "load the edit set, patch the layer",
    ),
    function(
        "vllm.v1.worker.gpu_worker:Worker.initialize_from_config",
        "kv_cache_config",
        "worker",
        "size the state beside the KV cache",
    ),
    function("vllm.forward_context:get_forward_context", "", "layer_patch", "find the step"),
    function(
        "vllm.forward_context:is_forward_context_available", "", "layer_patch", "find the step"
    ),
    named(
        "vllm.forward_context:ForwardContext",
        "no_compile_layers cudagraph_runtime_mode",
        "layer_patch",
        "find the state and whether a CUDA graph is captured",
    ),
    named(
        "vllm.config.compilation:CompilationConfig",
        "static_forward_context cudagraph_mode max_cudagraph_capture_size cache_dir",
        "layer_patch worker setup",
        "carry the state to the layer; CUDA graphs and the compile cache",
    ),
    function(
        "vllm.v1.worker.gpu_worker:Worker.execute_model",
        "scheduler_output",
        "worker",
        "end a step, report decisions",
    ),
    function(
        "vllm.v1.worker.gpu_worker:Worker.sample_tokens",
        "grammar_output",
        "worker",
        "report decisions",
    ),
    named("vllm.v1.outputs:ModelRunnerOutput", "", "worker", "report decisions"),
    named("vllm.v1.outputs:AsyncModelRunnerOutput", "", "worker", "report decisions"),
    named("vllm.v1.outputs:EMPTY_MODEL_RUNNER_OUTPUT", "", "worker", "shared by all steps"),
    named(
        "vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput",
        "_model_runner_output",
        "records",
        "the output that an asynchronous one yields",
    ),
    named(
        "vllm.v1.worker.gpu.async_utils:AsyncOutput",
        "model_runner_output",
        "records",
        "the output that an asynchronous one yields",
    ),
    function("vllm.distributed.parallel_state:get_tp_group", "", "parallel", "the ranks"),
    function("vllm.distributed.parallel_state:get_pp_group", "", "worker", "the stages"),
    named(
        "vllm.distributed.parallel_state:GroupCoordinator",
        "world_size rank_in_group is_last_rank all_gather all_reduce broadcast",
        "parallel worker",
        "candidates, sums and decisions of the ranks",
    ),
    named(
        "vllm.model_executor.models.utils:PPMissingLayer",
        "",
        "layer_patch",
        "a layer that another rank holds",
    ),
    named(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "",
        "kv_group",
        "a KV group that keeps all tokens",
    ),
    named("vllm.v1.kv_cache_interface:KVCacheSpec", "block_size", "kv_group", "count KV slots"),
    named(
        "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
        "kv_cache_specs",
        "kv_group",
        "a group of layers with sizes of their own",
    ),
    named(
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
        "kv_cache_spec",
        "kv_group",
        "a group's kind of attention",
    ),
    named(
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        "num_blocks kv_cache_groups",
        "kv_group",
        "count KV slots",
    ),
)
V1_RUNNER = (
    named(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "kv_cache_config input_batch query_start_loc requests",
        "runner_v1",
        "a step's requests",
    ),
    function(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs",
        "scheduler_output num_scheduled_tokens",
        "runner_v1",
        "a real step's inputs are final behind it",
    ),
    function(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding",
        "num_tokens num_reqs num_scheduled_tokens_np max_num_scheduled_tokens use_cascade_attn "
        "allow_microbatching force_eager force_uniform_decode force_has_lora "
        "force_num_active_loras num_encoder_reqs",
        "runner_v1",
        "keep a step out of CUDA graphs",
    ),
    named(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "req_ids num_reqs num_computed_tokens_cpu block_table",
        "runner_v1",
        "order and positions",
    ),
    named(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "prompt_token_ids sampling_params",
        "runner_v1",
        "plan a request",
    ),
    named(
        "vllm.v1.worker.block_table:MultiGroupBlockTable",
        "__getitem__",
        "runner_v1",
        "the block table of a KV group",
    ),
    named(
        "vllm.v1.worker.block_table:BlockTable",
        "block_size block_table",
        "runner_v1",
        "KV slots of a request",
    ),
    named("vllm.v1.utils:CpuGpuBuffer", "np gpu", "runner_v1", "host and device copies"),
    named(
        "vllm.config.compilation:CUDAGraphMode",
        "NONE",
        "runner_v1 layer_patch setup worker",
        "no CUDA graph",
    ),
)
_V2 = "vllm.v1.worker.gpu"
V2_RUNNER = (
    function(
        f"{_V2}.model_runner:GPUModelRunner.finish_requests",
        "scheduler_output",
        "runner_v2",
        "drop finished requests",
    ),
    function(
        f"{_V2}.model_runner:GPUModelRunner.add_requests",
        "scheduler_output",
        "runner_v2",
        "plan new requests",
    ),
    function(
        f"{_V2}.model_runner:GPUModelRunner.gather_batch_req_state",
        "scheduler_output dummy_run",
        "runner_v2",
        "the moment before a step's CUDA graph is chosen",
    ),
    named(
        f"{_V2}.model_runner:GPUModelRunner",
        "kv_cache_config req_states block_tables cudagraph_manager model_state "
        "dcp_size pcp_manager ubatch_runner fast_prefill adaptive_verification",
        "runner_v2",
        "a step's requests; refuse what lays rows out in another way",
    ),
    named(
        f"{_V2}.model_runner:BatchReqState",
        "req_ids num_scheduled_tokens idx_mapping_np",
        "runner_v2",
        "a step's order",
    ),
    named(f"{_V2}.states:RequestState", "num_computed_tokens_np", "runner_v2", "positions"),
    named(
        f"{_V2}.block_table:BlockTables",
        "block_tables block_sizes",
        "runner_v2",
        "KV slots of a request",
    ),
    named(f"{_V2}.buffer_utils:StagedWriteTensor", "gpu", "runner_v2", "the block table itself"),
    named(
        f"{_V2}.model_states.interface:ModelState",
        "num_new_sampled_tokens_per_step",
        "runner_v2",
        "tell diffusion models",
    ),
    function(
        f"{_V2}.cudagraph_utils:CudaGraphManager.dispatch",
        "num_reqs num_tokens uniform_token_count num_active_loras max_query_len num_ubatches",
        "runner_v2",
        "keep a step out of CUDA graphs",
    ),
    named(
        f"{_V2}.cudagraph_utils:CudaGraphManager",
        "_candidates",
        "runner_v2",
        "keep a step out of CUDA graphs",
    ),
    named(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "finished_req_ids scheduled_new_reqs",
        "runner_v2",
        "new and finished requests",
    ),
    named(
        "vllm.v1.core.sched.output:NewRequestData",
        "req_id prompt_token_ids sampling_params",
        "runner_v2",
        "plan a request",
    ),
)
