"""z of each prompt and its answer, computed once per edit run: the layers up to l never rerun."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microedit_trainer.contexts import PromptTokens
from microedit_trainer.language_model import LanguageModel, Progress, length_batches, pad_batch


@dataclass(frozen=True)
class StoredPrompt:
    """One prompt in one context with its residuals.

    Attributes:
        tokens: what was run.
        z: [P + A, d] in the model's dtype, prompt and answer.
        is_sink: [P + A] bool, tokens whose residual norm is an outlier.
    """

    tokens: PromptTokens
    z: Tensor
    is_sink: Tensor

    def to(self, device: torch.device | str) -> "StoredPrompt":
        """The same prompt with its residuals on another device."""
        return StoredPrompt(self.tokens, self.z.to(device), self.is_sink.to(device))

    @property
    def edited(self) -> slice:
        """Positions e, e+1, …: the last prompt token and every answer token."""
        return slice(self.tokens.edit_from, len(self.z))

    @property
    def answer_with_end(self) -> Tensor:
        """What the positions in `edited` must predict: the answer, then the end token. [A + 1]"""
        return torch.tensor([*self.tokens.answer_ids, self.tokens.end_id])

    @property
    def scored(self) -> Tensor:
        """Positions that the switch looks at, sinks left out: [S] int64."""
        start, stop = self.tokens.scored
        positions = torch.arange(start, stop)
        return positions[~self.is_sink[start:stop].cpu()]

    @property
    def identifying(self) -> Tensor:
        """Scored positions from `PromptTokens.identifying_from` on, or all where these are sinks:
        [S] int64."""
        own = self.scored[self.scored >= self.tokens.identifying_from]
        return own if len(own) else self.scored

    @property
    def shared(self) -> Tensor:
        """Scored positions that are not identifying: [S] int64."""
        return self.scored[~torch.isin(self.scored, self.identifying)]

    @property
    def about(self) -> Tensor:
        """`PromptTokens.subject_end` without sinks; the identifying positions where nothing is
        left: [S] int64."""
        end = self.tokens.subject_end
        own = self.scored[(self.scored >= end.start) & (self.scored < end.stop)]
        return own if len(own) else self.identifying


@torch.no_grad()
def store_residuals(
    lm: LanguageModel,
    layer: int,
    prompts: Sequence[PromptTokens],
    max_norm: float,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[StoredPrompt]:
    """Run the layers up to `layer` once over every prompt with its answer.

    Args:
        max_norm: residual norm above which a token is a sink.
        progress: called with the number of prompts done since the last call.
    """
    sequences = [[*p.prompt_ids, *p.answer_ids] for p in prompts]
    stored: dict[int, StoredPrompt] = {}
    for indices in length_batches([len(ids) for ids in sequences], batch):
        z = lm.lower(pad_batch([sequences[i] for i in indices]), layer)
        for row, index in enumerate(indices):
            own = z[row, : len(sequences[index])].clone()
            sinks = own.float().norm(dim=-1) > max_norm
            stored[index] = StoredPrompt(prompts[index], own, sinks)
        if progress is not None:
            progress(len(indices))
    return [stored[index] for index in range(len(prompts))]


def residuals_at(
    lm: LanguageModel,
    layer: int,
    prompts: Sequence[PromptTokens],
    where: Callable[[PromptTokens], int | slice],
    batch: int = 16,
) -> list[Tensor]:
    """z of each prompt there, and nothing else of it: [d] or [S, d], model dtype."""
    found: list[Tensor] = []
    for start in range(0, len(prompts), batch):
        stored = store_residuals(lm, layer, prompts[start : start + batch], float("inf"), batch)
        found += [p.z[where(p.tokens)].clone() for p in stored]
    return found


def predictions(
    lm: LanguageModel,
    layer: int,
    prompts: Sequence[StoredPrompt],
    residuals: Sequence[Tensor],
    batch: int = 32,
) -> list[Tensor]:
    """Greedy tokens under teacher forcing at the positions that predict the answer.

    Args:
        prompts: whose answers are scored.
        residuals: z of each prompt as it shall run, [P + A, d]: plain or with edited rows.

    Returns:
        per prompt [A] int64: the argmax at e, …, e + A − 1.
    """
    logits = _answer_logits(lm, layer, prompts, residuals, batch)
    found = {index: at_answer.argmax(-1).cpu() for index, at_answer in logits}
    return [found[index] for index in range(len(prompts))]


def answer_nll(
    lm: LanguageModel,
    layer: int,
    prompts: Sequence[StoredPrompt],
    residuals: Sequence[Tensor],
    batch: int = 32,
) -> list[Tensor]:
    """Negative log-likelihood of the answer's own tokens under teacher forcing.

    Args:
        prompts, residuals: as in `predictions`.

    Returns:
        per prompt [A] fp32: −log P of each answer token, without the end token.
    """
    found: dict[int, Tensor] = {}
    for index, logits in _answer_logits(lm, layer, prompts, residuals, batch):
        answer = torch.tensor(prompts[index].tokens.answer_ids, device=logits.device)
        found[index] = torch.nn.functional.cross_entropy(logits, answer, reduction="none").cpu()
    return [found[index] for index in range(len(prompts))]


def _answer_logits(
    lm: LanguageModel,
    layer: int,
    prompts: Sequence[StoredPrompt],
    residuals: Sequence[Tensor],
    batch: int,
) -> Iterator[tuple[int, Tensor]]:
    """Each prompt's place in `prompts`, and its logits at e, …, e + A − 1: [A, vocabulary]."""
    for indices in length_batches([len(z) for z in residuals], batch):
        hidden = run_upper(lm, layer, [residuals[i] for i in indices])
        for row, index in enumerate(indices):
            tokens = prompts[index].tokens
            start, count = tokens.edit_from, len(tokens.answer_ids)
            yield index, lm.logits(hidden[row, start : start + count])


@torch.no_grad()
def run_upper(lm: LanguageModel, layer: int, residuals: Sequence[Tensor]) -> Tensor:
    """Final hidden states of several sequences, right-padded: list of [S, d] → [B, max S, d]."""
    padded = torch.nn.utils.rnn.pad_sequence(list(residuals), batch_first=True)
    return lm.upper(padded.to(lm.device), layer)
