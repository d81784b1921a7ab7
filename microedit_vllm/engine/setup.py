"""From the flag to a server with edits: what the process that reads the flags does.

It adds the flags, checks everything that can be checked before other processes start, and names
our worker and scheduler in vLLM's configuration. All that the other processes need travels there.
"""

import sys
from pathlib import Path
from typing import Any

from microedit_vllm.artifact import Manifest
from microedit_vllm.artifact.manifest import SEQUENCE_FLAGS
from microedit_vllm.config import KEY, ServingConfig, check_model, summary
from microedit_vllm.engine.architectures import refuse_architecture
from microedit_vllm.engine.compatibility import check_private_names
from microedit_vllm.errors import MicroEditError

_EXIT_STATUS = 2
_installed = False


def install() -> None:
    """Add the flags to `EngineArgs` (`vllm/engine/arg_utils.py`); once per process."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.engine.arg_utils import EngineArgs

    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    def add_flags(parser: Any) -> Any:
        return _add_flags(add_cli_args(parser))

    def read_flags(cls: type, args: Any) -> Any:
        engine_args = from_cli_args(cls, args)
        _read_flags(engine_args, args)
        return engine_args

    def create_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = create_engine_config(self, *args, **kwargs)
        # Of several API servers, the process that starts them.
        first = self._api_process_count == 1 or self._api_process_rank == -1
        with_status(self, lambda: _prepare(vllm_config, announce=first))
        return vllm_config

    EngineArgs.add_cli_args = staticmethod(add_flags)
    EngineArgs.from_cli_args = classmethod(read_flags)
    EngineArgs.create_engine_config = create_config


def with_status(engine_args: Any, action: Any) -> None:
    """Run `action`; on a command line, end the process with one line where it finds an error."""
    try:
        action()
    except MicroEditError as error:
        if not getattr(engine_args, "_microedit_from_cli", False):
            raise
        print(f"microedit: {error}", file=sys.stderr, flush=True)
        raise SystemExit(_EXIT_STATUS) from None


def _add_flags(parser: Any) -> Any:
    group = parser.add_argument_group("MicroEdit", "Knowledge edits")
    group.add_argument("--microedit", metavar="SET", default=None, help="folder of an edit set")
    group.add_argument(
        "--microedit-sae",
        metavar="DIR",
        default=None,
        help="folder of its SAE, when it is not where the edit set says",
    )
    return parser


def _read_flags(engine_args: Any, args: Any) -> None:
    engine_args._microedit_from_cli = True
    edit_set, sae = getattr(args, "microedit", None), getattr(args, "microedit_sae", None)

    def put() -> None:
        if edit_set is None and sae is not None:
            raise MicroEditError("--microedit-sae needs --microedit")
        if edit_set is not None:
            value = {"edit_set": edit_set, "sae": sae}
            # Also into `args`: further API servers get these, and read them before the plugin is
            # there (`run_multi_api_server` in `vllm/entrypoints/cli/serve.py`).
            args.additional_config = {**(engine_args.additional_config or {}), KEY: value}
            engine_args.additional_config = args.additional_config

    with_status(engine_args, put)


def _prepare(vllm_config: Any, announce: bool) -> None:
    setting = ServingConfig.from_additional_config(vllm_config.additional_config)
    if setting is None:
        return
    check_private_names(vllm_config.use_v2_model_runner)
    _refuse_unsupported(vllm_config)
    refuse_architecture(vllm_config)
    from microedit_vllm.engine.frontend import check_requests, serve_routes
    from microedit_vllm.engine.worker import edit_worker_name

    operator = setting.load()
    edit_set, model = operator.edit_set, vllm_config.model_config
    if edit_set.manifest.position == "sequence":
        _refuse_schedule(vllm_config, setting.edit_set)
    check_model(
        edit_set,
        _model_folder(model),
        model.served_model_name if isinstance(model.served_model_name, str) else model.model,
        model.get_hidden_size(),
        model.get_total_num_hidden_layers(),
    )
    manifest = edit_set.manifest
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        KEY: setting.to_dict(manifest.layer),
    }
    parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
    parallel.worker_cls = edit_worker_name(parallel.worker_cls)
    name = "EditAsyncScheduler" if scheduling.async_scheduling else "EditScheduler"
    scheduling.scheduler_cls = f"microedit_vllm.engine.scheduler.{name}"
    _separate_cache(vllm_config.compilation_config, manifest.layer)
    check_requests()
    _adapt_graphs(vllm_config.compilation_config, manifest)
    serve_routes()
    if announce:
        _announce(summary(manifest, setting.edit_set))


def _refuse_unsupported(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    reasons = {
        "a custom --scheduler-cls": vllm_config.scheduler_config.scheduler_cls is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "--enable-dbo": getattr(parallel, "enable_dbo", False),
        "pooling models": vllm_config.model_config.runner_type == "pooling",
    }
    for reason, is_set in reasons.items():
        if is_set:
            raise MicroEditError(f"edits do not work together with {reason} yet")


def _refuse_schedule(vllm_config: Any, folder: Path) -> None:
    """The paper's placement needs a whole prompt in one step, and each of its tokens computed."""
    is_wrong = (
        vllm_config.scheduler_config.enable_chunked_prefill,
        vllm_config.cache_config.enable_prefix_caching,
    )
    missing = [flag for flag, wrong in zip(SEQUENCE_FLAGS, is_wrong, strict=True) if wrong]
    if missing:
        raise MicroEditError(
            f"{folder} has position 'sequence' (ẑ on every token of a prompt), which needs the "
            f"whole prompt in one step: start with {' '.join(missing)}"
        )


def _adapt_graphs(compilation: Any, manifest: Manifest) -> None:
    """CUDA graphs hold the edit change by threshold only (`captured_edit`)."""
    from vllm.config.compilation import CUDAGraphMode

    if manifest.activation == "topk":
        compilation.cudagraph_mode = CUDAGraphMode.NONE


def _separate_cache(compilation: Any, layer: int) -> None:
    """Keep graphs of other servers out of a compile cache folder that the user named.

    vLLM's own folder carries a hash over `additional_config`; a named one is taken as it is, and
    its graphs by number alone (`vllm/compilation/backends.py`), with or without the patch.
    """
    if compilation.cache_dir:
        compilation.cache_dir = str(Path(compilation.cache_dir) / f"microedit-layer-{layer}")


def _model_folder(model: Any) -> Path:
    """The local folder with the model's weights; a hub id is fetched into vLLM's own cache."""
    folder = Path(model.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model.model, revision=model.revision, allow_patterns=["*.safetensors"]
            )
        )
    except Exception as error:
        first = str(error).splitlines()[0]
        raise MicroEditError(f"cannot fetch the weights of {model.model} ({first})") from error


def _announce(fields: dict[str, Any]) -> None:
    from vllm.logger import init_logger

    text = ", ".join(f"{name} {value}" for name, value in fields.items() if name != "edit_set")
    # A logger below "vllm", because vLLM sets levels and format there.
    init_logger("vllm.microedit").info("microedit: edit set %s: %s", fields["edit_set"], text)
