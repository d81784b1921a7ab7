"""Golden prompts of a finished edit set, computed by the trainer's own forward pass.

Prompt by prompt, as a server runs a request that is alone: in bf16 a padded batch rounds otherwise.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microedit_trainer.contexts import PromptTokens
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact import GoldenPrompt, Misreading

ANSWER_TOKENS = 4
# A decision nearer to τ than this share of the ARD is left to rounding. Relative ARD is 1 where no
# changed row is active, and rounding moves only its distance from 1: within 0.98 to 1.02 it differs
# by at most 0.3% between bf16 and fp32 (measured, Gemma-3-270M), at 0.2 by 2%.
CLEAR_DECISION = 0.15
CLEAR_NEAR_ONE = 0.02
# Relative size of rounding in z, and how far it may move ln(ARD): half of what verification allows
# one prompt. Farther, a latent is about to leave the Top-k for another of equal pre_acts.
ROUNDING, STEADY = {torch.float32: 1e-4}, {torch.float32: 0.01}
ROUNDING_HALF, STEADY_HALF = 4e-3, 0.1
ROUNDING_DRAWS = 8
# Distance in logits from the greedy token to the next that rounding does not bridge.
CLEAR_TOKEN = {torch.float32: 0.01}
CLEAR_TOKEN_HALF = 1.0


@torch.no_grad()
def golden_prompts(
    engine: TorchEngine, prompts: Sequence[PromptTokens], on: bool, count: int
) -> list[GoldenPrompt]:
    """The first `count` of the prompts whose switch is clearly on, or clearly off, and whose ARD
    does not hang on a tie of latents.

    Args:
        engine: with the finished set; knows the residuals of most of the prompts already.
        prompts: without answers.
    """
    if not prompts:
        return []
    decision = engine.operator.edit_set.manifest.decision
    ards = engine.ards(prompts)
    margin = _unclear(ards, decision.statistic == "relative")
    clear = ards <= decision.tau * (1 - margin) if on else ards >= decision.tau * (1 + margin)
    chosen = (p for p, is_clear in zip(prompts, clear.tolist(), strict=True) if is_clear)
    steady = (p for p in chosen if _is_steady(engine, p))
    return [_golden(engine, prompt) for prompt in islice(steady, count)]


def _unclear(ards: Tensor, relative: bool) -> Tensor:
    """The share of τ, [N], within which a decision about each of these ARDs is not clear."""
    if not relative:
        return torch.full_like(ards, CLEAR_DECISION)
    return (CLEAR_NEAR_ONE + CLEAR_DECISION * (ards - 1).abs()).clamp(max=CLEAR_DECISION)


def _is_steady(engine: TorchEngine, prompt: PromptTokens) -> bool:
    """Whether rounding in z leaves the ARD about where it is."""
    dtype = engine.lm.dtype
    (stored,) = engine.store.of([prompt])
    generator = torch.Generator().manual_seed(0)
    shape = (ROUNDING_DRAWS, *stored.z.shape)
    noise = ROUNDING.get(dtype, ROUNDING_HALF) * torch.randn(shape, generator=generator)
    z = stored.z.float()
    rounded = [replace(stored, z=(z * (1 + some.to(z.device))).to(dtype)) for some in noise]
    # Infinite where nothing is scored, which stays so.
    ards = engine.ards_of([stored, *rounded]).clamp(1e-6, 1e6).log()
    return bool((ards[1:] - ards[0]).abs().max() <= STEADY.get(dtype, STEADY_HALF))


def _golden(engine: TorchEngine, prompt: PromptTokens) -> GoldenPrompt:
    readings = _readings(engine, prompt)
    ard = engine.ard(readings.pop("right"))
    on = bool(engine.operator.is_on(ard))
    plain = _answer(engine, prompt, on=False)
    return GoldenPrompt(
        token_ids=prompt.prompt_ids,
        edit_from=prompt.edit_from,
        ard=_finite(ard),
        on=on,
        edited=_answer(engine, prompt, on=True) if on else plain,
        plain=plain,
        misread={name: _finite(engine.ard(stored)) for name, stored in readings.items()},
    )


def _finite(ard: Tensor) -> float | None:
    return float(ard) if ard.isfinite() else None


def _readings(engine: TorchEngine, prompt: PromptTokens) -> dict[Any, StoredPrompt]:
    """The prompt's residuals as they are ("right"), and by `Misreading` as they are not."""
    manifest = engine.operator.edit_set.manifest
    read = read_around(engine.lm, manifest.layer, prompt.prompt_ids)
    max_norm = manifest.decision.max_norm
    return {
        name: StoredPrompt(prompt, z, z.float().norm(dim=-1) > max_norm) for name, z in read.items()
    }


def read_around(lm: LanguageModel, layer: int, token_ids: Sequence[int]) -> dict[Any, Tensor]:
    """z of one sequence behind `layer` ("right"), and what lies near that place by `Misreading`.

    The last module that runs inside a decoder layer gives the last addend of the residual stream,
    which vLLM's fused layers return as `hidden_states` beside the sum of the others, `residual`.

    Returns:
        [P, d] each, in the model's dtype; a place that the model does not have is left out.
    """
    caught: dict[Misreading | str, Tensor] = {}

    def keep(name: Misreading | str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            caught[name] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    places = {"layer_before": layer - 1, "right": layer, "layer_after": layer + 1}
    layers = lm.decoder_layers
    watched = [(n, layers[i]) for n, i in places.items() if 0 <= i < lm.num_layers]
    watched += [("hidden_states_alone", child) for child in layers[layer].children()]
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched]
    try:
        ids = torch.tensor([list(token_ids)], device=lm.device)
        lm.decoder(input_ids=ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    z, last = caught["right"], caught.get("hidden_states_alone")
    if last is not None and last.shape == z.shape:
        caught["residual_alone"] = (z.float() - last.float()).to(z.dtype)
    else:
        caught.pop("hidden_states_alone", None)
    return caught


def _answer(engine: TorchEngine, prompt: PromptTokens, on: bool) -> tuple[int, ...]:
    """Greedy tokens up to the first unclear one, the end token or `ANSWER_TOKENS`."""
    clear = CLEAR_TOKEN.get(engine.lm.dtype, CLEAR_TOKEN_HALF)
    answer: list[int] = []
    for token, margin in islice(engine.greedy(prompt, on), ANSWER_TOKENS):
        if margin < clear:
            break
        answer.append(token)
        if token == prompt.end_id:
            break
    return tuple(answer)
