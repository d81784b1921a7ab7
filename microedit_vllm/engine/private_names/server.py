"""Names that the API server, the configuration and the scheduler rely on."""

from microedit_vllm.engine.private_names.entry import function, named

SERVER = (
    named("vllm:EngineArgs", "", "setup", "the class that is patched, as users import it"),
    function("vllm.engine.arg_utils:EngineArgs.add_cli_args", "parser", "setup", "add the flags"),
    function("vllm.engine.arg_utils:EngineArgs.from_cli_args", "args", "setup", "read the flags"),
    function(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "usage_context headless",
        "setup",
        "check the setting, name our worker and scheduler",
    ),
    named(
        "vllm.engine.arg_utils:EngineArgs",
        "additional_config _api_process_count _api_process_rank",
        "setup",
        "carry the setting; announce it once",
    ),
    named(
        "vllm.config.vllm:VllmConfig",
        "additional_config model_config parallel_config scheduler_config kv_transfer_config "
        "use_v2_model_runner",
        "setup frontend scheduler worker",
        "read the setting, refuse what does not work with edits",
    ),
    named(
        "vllm.model_executor.models.registry:_VLLM_MODELS",
        "",
        "architectures",
        "every architecture that vLLM serves",
    ),
    named(
        "vllm.config.cache:CacheConfig",
        "enable_prefix_caching",
        "setup",
        "what position 'sequence' needs",
    ),
    named("vllm:LLM", "", "golden_prompts", "verify offline"),
    named("vllm:SamplingParams", "", "golden_prompts", "verify offline"),
    named(
        "vllm.config.parallel:ParallelConfig",
        "worker_cls decode_context_parallel_size enable_dbo",
        "setup",
        "name our worker",
    ),
    named(
        "vllm.config.scheduler:SchedulerConfig",
        "scheduler_cls async_scheduling",
        "setup",
        "name our scheduler",
    ),
    named(
        "vllm.config.model:ModelConfig",
        "model revision served_model_name runner_type get_hidden_size get_total_num_hidden_layers",
        "setup",
        "compare the model with the edit set's",
    ),
    function("vllm.logger:init_logger", "name", "setup", "announce the edit set"),
    named("vllm.exceptions:VLLMValidationError", "", "frontend", "a bad option is HTTP 400"),
    function(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "request_id prompt params supported_tasks arrival_time lora_request tokenization_kwargs "
        "trace_headers priority data_parallel_rank resumable session_id kv_hints",
        "frontend",
        "check a request's options where it enters",
    ),
    named(
        "vllm.v1.engine.input_processor:InputProcessor",
        "vllm_config",
        "frontend",
        "find the setting",
    ),
    function(
        "vllm.v1.engine.input_processor:InputProcessor.assign_request_id",
        "request",
        "records runner_v2",
        "the random tail of a request's id",
    ),
    function(
        "vllm.v1.engine.parallel_sampling:ParentRequest.get_child_info",
        "index",
        "records",
        "the number before the id of each of n samples",
    ),
    named(
        "vllm.v1.engine:EngineCoreRequest",
        "prompt_token_ids sampling_params",
        "frontend",
        "a request's tokens and options",
    ),
    named(
        "vllm.sampling_params:SamplingParams",
        "extra_args",
        "frontend scheduler runner_v1 runner_v2",
        "a request's options (`vllm_xargs`)",
    ),
    named(
        "vllm.entrypoints.launchers.app:register_api_routers", "", "frontend", "where it is called"
    ),
    function(
        "vllm.entrypoints.launchers.api_server.routers:register_api_routers",
        "args app supported_tasks model_config",
        "frontend",
        "add our routes",
    ),
    function(
        "vllm.entrypoints.llm:LLM.collective_rpc",
        "method timeout args kwargs",
        "records",
        "read decisions offline",
    ),
    named("vllm.v1.engine.async_llm:AsyncLLM", "engine_core", "routes", "reach the engines"),
    function(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async",
        "method *args",
        "routes",
        "read decisions of all data-parallel engines",
    ),
    function(
        "vllm.v1.engine.core:EngineCore.collective_rpc",
        "method timeout args kwargs",
        "routes",
        "read decisions",
    ),
)
SCHEDULER = (
    named(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "kv_cache_manager requests vllm_config",
        "scheduler",
        "the base of our scheduler",
    ),
    named(
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "",
        "scheduler",
        "the base of our scheduler",
    ),
    function(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "throttle_prefills",
        "scheduler",
        "note how often a step's requests had been preempted",
    ),
    function(
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "scheduler_output model_runner_output",
        "scheduler",
        "take the decisions that come back",
    ),
    function(
        "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
        "request timestamp drop_stale_output",
        "scheduler",
        "forget the decision of a request that is computed again",
    ),
    function(
        "vllm.v1.core.sched.scheduler:Scheduler._free_request_blocks",
        "request",
        "scheduler",
        "store the answer of a request that stayed off",
    ),
    function(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        "request",
        "prefix_cache",
        "shorten prefix hits",
    ),
    named(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "coordinator block_pool kv_cache_config",
        "prefix_cache scheduler",
        "find what stores and allocates blocks",
    ),
    named(
        "vllm.v1.core.kv_cache_manager:KVCacheBlocks",
        "blocks",
        "prefix_cache",
        "the blocks of a prefix hit",
    ),
    function(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
        "request num_computed_tokens",
        "prefix_cache",
        "store no block that may hold substituted tokens",
    ),
    named(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator",
        "single_type_managers",
        "prefix_cache",
        "find the blocks of a request",
    ),
    named(
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
        "block_size req_to_blocks",
        "prefix_cache",
        "find the blocks of a request",
    ),
    function(
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
        "num_blocks",
        "prefix_cache",
        "forget what a block held before",
    ),
    named(
        "vllm.v1.request:Request",
        "num_tokens num_computed_tokens num_preemptions prompt_token_ids sampling_params",
        "prefix_cache scheduler",
        "plan a request, bound what is stored of it",
    ),
)
