"""Residual-stream activations of many sequences, collected into one memory-mapped file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from microedit_trainer.language_model import LanguageModel, length_batches, pad_batch
from microedit_trainer.token_sequences import TokenSequences
from microedit_vllm.errors import MicroEditError

SINK_FACTOR = 2.0
"""A token whose norm exceeds this many medians is an attention sink.

On SmolLM2-135M and Gemma-3-270M hardly a token but a text's first is above 1.5. The second one of
"On 28 August, …" is at 2.3, and such a token alone decides about a run of others.
"""

_SEQUENCES_AT_ONCE = 32
_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Activations:
    """z of every used token, sinks included; `train` and `held_out` leave them out.

    Attributes:
        rows: [N, d] bf16, memory-mapped.
        source: [N] int64, index into `names`; is_held_out: [N] bool; norms: [N] fp32, ‖z‖.
        median_norm: of all rows; max_norm: the largest norm of a token that is no sink.
    """

    rows: Tensor
    source: Tensor
    is_held_out: Tensor
    norms: Tensor
    median_norm: float
    max_norm: float
    names: tuple[str, ...]

    @property
    def is_ordinary(self) -> Tensor:
        """[N] bool: no sink."""
        return self.norms <= self.max_norm

    @property
    def train(self) -> Tensor:
        """Indices of the rows to train on: [M] int64."""
        return (self.is_ordinary & ~self.is_held_out).nonzero().flatten()

    def held_out(self, name: str) -> Tensor:
        """Indices of a source's held-out rows: [M] int64."""
        mine = self.source == self.names.index(name)
        return (mine & self.is_ordinary & self.is_held_out).nonzero().flatten()


def collect_activations(
    model: LanguageModel,
    layer: int,
    sequences: TokenSequences,
    path: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Activations:
    """Run the layers up to `layer` on every sequence and store z in `path` as raw bf16.

    A file that a stopped run left is continued behind its last whole batch.

    Args:
        progress: called with the rows stored and their total.

    Raises:
        MicroEditError: the file cannot be written.
    """
    batches = list(length_batches(sequences.lengths.tolist(), _SEQUENCES_AT_ONCE))
    used = sequences.used
    order = torch.tensor([index for batch in batches for index in batch], dtype=torch.long)
    total = int(used.sum())
    _store(model, layer, sequences, batches, path, lambda n: progress and progress(n, total))
    size = total * model.hidden_size
    rows = torch.from_file(str(path), shared=False, size=size, dtype=torch.bfloat16)
    rows = rows.view(total, model.hidden_size)
    norms = torch.cat([part.float().norm(dim=-1) for part in rows.split(_ROWS_AT_ONCE)])
    median = float(norms.median())
    return Activations(
        rows=rows,
        source=sequences.source[order].repeat_interleave(used[order]),
        is_held_out=sequences.held_out[order].repeat_interleave(used[order]),
        norms=norms,
        median_norm=median,
        max_norm=SINK_FACTOR * median,
        names=sequences.names,
    )


def _store(
    model: LanguageModel,
    layer: int,
    sequences: TokenSequences,
    batches: list[list[int]],
    path: Path,
    stored: Callable[[int], object],
) -> None:
    ids, starts, used = sequences.split(), sequences.starts.tolist(), sequences.used
    row_bytes = 2 * model.hidden_size
    try:
        with path.open("ab") as file:
            done = _whole_batches(file.tell() // row_bytes, batches, used)
            count = sum(int(used[batch].sum()) for batch in batches[:done])
            file.truncate(count * row_bytes)
            for batch in batches[done:]:
                z = model.lower(pad_batch([ids[i] for i in batch]), layer).bfloat16().cpu()
                kept = [z[row, starts[i] : len(ids[i])] for row, i in enumerate(batch)]
                rows = torch.cat(kept)
                file.write(rows.contiguous().view(torch.uint8).numpy().tobytes())
                count += len(rows)
                stored(count)
    except OSError as error:
        raise MicroEditError(f"cannot write {path}: {error.strerror}") from error


def _whole_batches(rows: int, batches: list[list[int]], used: Tensor) -> int:
    """How many batches `rows` stored rows complete."""
    for done, batch in enumerate(batches):
        rows -= int(used[batch].sum())
        if rows < 0:
            return done
    return len(batches)
