"""The API server's side: our routes, and our request options checked before they go further."""

from typing import Any

from vllm.exceptions import VLLMValidationError

from microedit_vllm.artifact import Manifest
from microedit_vllm.engine.request_plan import plan_request
from microedit_vllm.errors import MicroEditError


class BadOptionError(VLLMValidationError, ValueError):
    """A bad value in `vllm_xargs`: HTTP 400 on a server, a ValueError offline."""


def check_requests(manifest: Manifest) -> None:
    """Refuse bad options where a request enters (`vllm/v1/engine/input_processor.py`)."""
    from vllm.v1.engine.input_processor import InputProcessor

    process_inputs = getattr(
        InputProcessor.process_inputs, "microedit_original", InputProcessor.process_inputs
    )

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        params = request.sampling_params
        if params is not None and "microedit" in self.vllm_config.additional_config:
            try:
                plan_request(request.prompt_token_ids, params.extra_args, manifest)
            except MicroEditError as error:
                raise BadOptionError(str(error)) from None
        return request

    checked.microedit_original = process_inputs  # type: ignore[attr-defined]
    InputProcessor.process_inputs = checked


def serve_routes() -> None:
    """Add our routes wherever vLLM builds its app (`vllm/entrypoints/launchers/app.py`)."""
    from vllm.entrypoints.launchers import app as launcher

    if getattr(launcher.register_api_routers, "microedit", False):
        return
    register_api_routers = launcher.register_api_routers

    def register(args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
        from microedit_vllm.engine.routes import router

        register_api_routers(args, app, *rest, **kwargs)
        app.include_router(router)

    register.microedit = True  # type: ignore[attr-defined]
    launcher.register_api_routers = register
