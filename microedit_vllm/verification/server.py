"""Golden prompts over HTTP."""

from typing import Any

from openai import OpenAIError

from microedit_vllm.artifact import EditSet, GoldenPrompt
from microedit_vllm.errors import MicroEditError
from microedit_vllm.served_model import ServedModel
from microedit_vllm.verification.comparison import (
    Observation,
    Report,
    compare,
    golden_prompts_of,
    num_tokens,
)


def verify_server(server: ServedModel, edit_set: EditSet, dtype: str | None = None) -> Report:
    """Send the set's golden prompts, one after another, and compare.

    Args:
        dtype: what the server computes in; None: the set's.

    Raises:
        MicroEditError: the set has no golden prompts, the server serves no edit set or another
            one, or it refuses a prompt.
    """
    prompts = golden_prompts_of(edit_set)
    _check_same_set(server.edit_set(), edit_set)
    observations = [_observe(server, prompt) for prompt in prompts]
    return compare(edit_set, observations, dtype or edit_set.manifest.model.dtype)


def _check_same_set(shown: dict[str, Any], edit_set: EditSet) -> None:
    manifest = edit_set.manifest
    mine = {
        "facts": manifest.facts,
        "layer": manifest.layer,
        "k": manifest.sae.k,
        "tau": manifest.decision.tau,
    }
    for name, value in mine.items():
        if shown.get(name, value) != value:
            raise MicroEditError(
                f"the server serves another edit set ({shown.get('edit_set')}: {name} "
                f"{shown[name]}, not {value}); name the folder that it was started with"
            )


def _observe(server: ServedModel, prompt: GoldenPrompt) -> Observation:
    on = {"microedit": "on", "microedit_edit_from": prompt.edit_from}
    request_id, edited = _complete(server, prompt, on)
    _, plain = _complete(server, prompt, {"microedit": "off"})
    decision = server.find_decision(request_id)
    if decision is None:
        return Observation(None, None, edited, plain)
    ard = decision["ard"]
    return Observation(None if ard == float("inf") else ard, decision["on"], edited, plain)


def _complete(
    server: ServedModel, prompt: GoldenPrompt, options: dict[str, Any]
) -> tuple[str, tuple[int, ...]]:
    """The request's id and its greedy tokens, whatever the model's generation config says."""
    body = {
        "vllm_xargs": options,
        "return_token_ids": True,
        "ignore_eos": True,
        "repetition_penalty": 1.0,
    }
    try:
        completion: Any = server.client.completions.create(
            model=server.model,
            prompt=list(prompt.token_ids),
            max_tokens=num_tokens(prompt),
            temperature=0,
            extra_body=body,
        )
    except OpenAIError as error:
        raise MicroEditError(f"the server refuses a golden prompt: {error}") from error
    return completion.id, tuple(completion.choices[0].token_ids)
