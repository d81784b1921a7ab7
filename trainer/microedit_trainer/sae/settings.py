"""What an SAE training run is asked for."""

import math
from dataclasses import dataclass

from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class SaeSettings:
    """Settings of one run; together with the texts they determine the weights.

    Attributes:
        layer: decoder layer whose output is trained on, from 0.
        width: latents n; k: latents kept per token.
        text: sources (see `text_sources`), "questions" among them; "self" stands for text sampled
            from the model.
        tokens: tokens to collect, sampled ones included.
        steps: optimiser steps; 0 takes `default_steps`.
        batch: tokens per step; lr: Adam's peak rate.
        sample_tokens: tokens that the model samples itself; 0 takes a source's share when
            "self" is among the sources.
        sequence_length: tokens per sequence.
        heldout_share: share of each source's text that is kept for the report.
        checkpoint_every: steps between two checkpoints.
    """

    layer: int
    width: int
    k: int
    text: tuple[str, ...]
    tokens: int = 100_000
    steps: int = 0
    batch: int = 1024
    lr: float = 2e-3
    seed: int = 0
    sample_tokens: int = 0
    sequence_length: int = 128
    heldout_share: float = 0.05
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Raises MicroEditError: numbers that no run can have."""
        if self.k < 1:
            raise MicroEditError(f"k is {self.k}; at least one latent must stay active")
        if self.width < self.k:
            raise MicroEditError(f"width {self.width} is smaller than k = {self.k}")
        for name in ("tokens", "batch", "sequence_length", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise MicroEditError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.steps < 0 or self.sample_tokens < 0 or not (0 < self.lr < math.inf):
            raise MicroEditError("steps and sample_tokens must not be negative, lr must be > 0")

    @property
    def total_steps(self) -> int:
        return self.steps or default_steps(self.tokens, self.batch)


def default_steps(tokens: int, batch: int) -> int:
    """Nine passes over the text, and never fewer than a small SAE needs to settle."""
    return max(850, math.ceil(9 * tokens / batch))
