"""The API server's side: our routes, and our request options checked before they go further."""

from typing import Any

from vllm.exceptions import VLLMValidationError

from microedit_vllm.config import KEY
from microedit_vllm.engine.request_plan import decision_position
from microedit_vllm.errors import MicroEditError


class BadOptionError(VLLMValidationError, ValueError):
    """A bad value in `vllm_xargs`: HTTP 400 on a server, a ValueError offline."""


def check_requests() -> None:
    """Refuse bad options where a request enters (`vllm/v1/engine/input_processor.py`)."""
    from vllm.v1.engine.input_processor import InputProcessor

    process_inputs = InputProcessor.process_inputs
    if getattr(process_inputs, "microedit", False):
        return

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        params = request.sampling_params
        if params is not None and KEY in self.vllm_config.additional_config:
            try:
                decision_position(request.prompt_token_ids, params.extra_args)
            except MicroEditError as error:
                raise BadOptionError(str(error)) from None
        return request

    checked.microedit = True  # type: ignore[attr-defined]
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
