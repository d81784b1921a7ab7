"""vLLM's entry point: adds the flags, and nothing else until one of them is used."""


def register() -> None:
    """Called by vLLM in every process (`vllm.general_plugins`), possibly more than once."""
    from microedit_vllm.engine.setup import install

    install()
