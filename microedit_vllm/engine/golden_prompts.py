"""Golden prompts through `vllm.LLM`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microedit_vllm.artifact import EditSet, GoldenPrompt
from microedit_vllm.artifact.edit_set import MANIFEST
from microedit_vllm.artifact.manifest import read_manifest
from microedit_vllm.config import SEQUENCE_ARGUMENTS
from microedit_vllm.engine.records import decisions
from microedit_vllm.errors import MicroEditError
from microedit_vllm.verification.comparison import (
    Observation,
    Report,
    compare,
    golden_prompts_of,
    num_tokens,
)


def verify_llm(llm: Any, edit_set: EditSet, dtype: str | None = None) -> Report:
    """Send the set's golden prompts to a `vllm.LLM` that serves it, one after another, and compare.

    Args:
        dtype: what the engine computes in; None: the set's.

    Raises:
        MicroEditError: the set has no golden prompts.
    """
    observations = [_observe(llm, prompt) for prompt in golden_prompts_of(edit_set)]
    return compare(edit_set, observations, dtype or edit_set.manifest.model.dtype)


def _observe(llm: Any, prompt: GoldenPrompt) -> Observation:
    on = {"microedit": "on", "microedit_edit_from": prompt.edit_from}
    request_id, edited = _generate(llm, prompt, on)
    _, plain = _generate(llm, prompt, {"microedit": "off"})
    decision = decisions(llm, [request_id]).get(request_id, {"ard": None, "on": None})
    return Observation(decision["ard"], decision["on"], edited, plain)


def _generate(
    llm: Any, prompt: GoldenPrompt, options: dict[str, Any]
) -> tuple[str, tuple[int, ...]]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=num_tokens(prompt), ignore_eos=True, extra_args=options
    )
    (output,) = llm.generate({"prompt_token_ids": list(prompt.token_ids)}, params, use_tqdm=False)
    return output.request_id, tuple(output.outputs[0].token_ids)


@contextmanager
def verification_engine(
    model: str, edit_set: Path, sae: Path | None, prompts: Sequence[GoldenPrompt], dtype: str
) -> Iterator[Any]:
    """A `vllm.LLM` for these prompts inside the block, eager and small; no process of it behind.

    Raises:
        MicroEditError: vLLM is not installed, or cannot serve the model with the set.
    """
    setting = {"edit_set": str(edit_set), "sae": None if sae is None else str(sae)}
    length = max(len(p.token_ids) + num_tokens(p) for p in prompts) + 1
    arguments: dict[str, Any] = {}
    if read_manifest(edit_set / MANIFEST).position == "sequence":
        arguments = {**SEQUENCE_ARGUMENTS, "max_num_batched_tokens": length}
    try:
        from vllm import LLM

        llm = LLM(
            model,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=length,
            max_num_seqs=1,
            **arguments,
            additional_config={"microedit": setting},
        )
    except MicroEditError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MicroEditError(f"vLLM cannot serve {model} with {edit_set}: {reason}") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
