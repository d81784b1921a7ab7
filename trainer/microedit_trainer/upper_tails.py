"""The layers above the cut, run only where z changes.

The keys and values of the tokens before those positions stay as they are. They are computed once;
every later run attends to them and computes nothing but the tails.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from microedit_trainer.language_model import LanguageModel

# Largest relative difference of a token's final hidden state that is still rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDING_16_BIT = 0.1

UpperTails = Callable[[Tensor], Tensor]


def upper_tails(
    lm: LanguageModel, layer: int, residuals: Sequence[Tensor], starts: Sequence[int]
) -> UpperTails:
    """The upper half of several sequences as a function of z from a position of each on.

    Over a cached prefix where the model's own forward takes one and gives what it gives for the
    whole sequences, which is tried here on the unchanged z; else over the whole sequences.

    Args:
        residuals: z of each sequence, [S, d] each, model dtype.
        starts: of each sequence, the first position that may change.

    Returns:
        changed z at these positions, sequence after sequence, [N, d] → final hidden states there,
        [N, d]; differentiable.
    """
    whole = _WholeSequences(lm, layer, residuals, starts)
    if not any(starts):
        return whole
    unchanged = torch.cat([z[start:] for z, start in zip(residuals, starts, strict=True)])
    try:
        cache = DynamicCache()
        expected = whole(unchanged, past_key_values=cache, use_cache=True)
        cached = _CachedPrefixes(lm, layer, residuals, starts, cache)
        return cached if _is_rounding(cached(unchanged), expected) else whole
    except Exception:
        # A forward that takes no such cache fails in its own way. Whatever else is wrong with the
        # model or its input fails over the whole sequences as well, and is reported from there.
        return whole


@torch.no_grad()
def _is_rounding(found: Tensor, expected: Tensor) -> bool:
    limit = _ROUNDING.get(expected.dtype, _ROUNDING_16_BIT)
    found, expected = found.float(), expected.float()
    return bool(((found - expected).norm(dim=-1) <= limit * expected.norm(dim=-1)).all())


class _WholeSequences:
    """Every token of every sequence, right-padded."""

    def __init__(
        self, lm: LanguageModel, layer: int, residuals: Sequence[Tensor], starts: Sequence[int]
    ) -> None:
        self.lm = lm
        self.layer = layer
        self.z = torch.nn.utils.rnn.pad_sequence(list(residuals), batch_first=True)
        rows, offsets = _places(residuals, starts)
        self.where = (rows, offsets + torch.tensor(starts, device=rows.device)[rows])

    def __call__(self, changed: Tensor, **inputs: Any) -> Tensor:
        z = self.z.index_put(self.where, changed)
        return self.lm.upper(z, self.layer, **inputs)[self.where]


class _CachedPrefixes:
    """The tails alone, aligned at their first positions: prefixes are padded on the left.

    Args:
        cache: keys and values of the whole sequences, right-padded.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        residuals: Sequence[Tensor],
        starts: Sequence[int],
        cache: Any,
    ) -> None:
        self.lm = lm
        self.layer = layer
        self.where = _places(residuals, starts)
        device = residuals[0].device
        longest = max(len(z) - start for z, start in zip(residuals, starts, strict=True))
        self.shape = (len(residuals), longest, residuals[0].shape[-1])
        begin = torch.tensor(starts, device=device)[:, None]
        # Padded tails may point behind the last position that the model knows.
        positions = begin + torch.arange(longest, device=device)
        self.positions = positions.clamp(max=lm.max_length - 1)
        # Where each place of the left-padded prefixes lies in the right-padded sequences.
        source = begin - max(starts) + torch.arange(max(starts), device=device)
        tails = torch.ones(self.shape[:2], dtype=torch.bool, device=device)
        self.mask = torch.cat([source >= 0, tails], dim=1).long()
        self.prefixes = [
            _Prefix(*(_gather(states, source.clamp(min=0)) for states in (kept.keys, kept.values)))
            for kept in cache.layers[layer + 1 :]
        ]

    def __call__(self, changed: Tensor) -> Tensor:
        z = changed.new_zeros(self.shape).index_put(self.where, changed)
        # The layers below the cut never run; what the model asks of the first is its length.
        below = [self.prefixes[0]] * (self.layer + 1)
        hidden = self.lm.upper(
            z,
            self.layer,
            past_key_values=Cache(layers=[*below, *self.prefixes]),
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=True,
        )
        return hidden[self.where]


class _Prefix(DynamicLayer):
    """One layer's keys and values [B, heads, L, d_head]; what a run adds is not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


def _gather(states: Tensor, source: Tensor) -> Tensor:
    """[B, heads, S, d_head] at the places [B, L] → [B, heads, L, d_head]."""
    index = source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.detach().gather(2, index)


def _places(residuals: Sequence[Tensor], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sequence, and offset from its start, of every position that may change: two [N]."""
    counts = [len(z) - start for z, start in zip(residuals, starts, strict=True)]
    device = residuals[0].device
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    offsets = torch.cat([torch.arange(count) for count in counts])
    return rows.to(device), offsets.to(device)
