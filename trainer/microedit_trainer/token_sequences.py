"""Token sequences to run the model on, cut from texts, with a part held out."""

import math
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from microedit_trainer.text_sources import Text
from microedit_vllm.artifact.atomic import atomic_folder
from microedit_vllm.artifact.tensors import expect, read_tensors

_TEXTS_AT_ONCE = 256
_MIN_TOKENS = 4


@dataclass(frozen=True)
class TokenSequences:
    """Sequences laid end to end.

    Attributes:
        ids: [total] int32; lengths: [count] int64.
        starts: [count] int64, the first position of each whose activation is used. Position 0
            never is; nor is one whose whole prefix occurred before (a chat template's system
            prompt): its activation would be a copy, and held-out text would be trained on.
        source: [count] int64, index into `names`; held_out: [count] bool.
    """

    ids: Tensor
    lengths: Tensor
    starts: Tensor
    source: Tensor
    held_out: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def used(self) -> Tensor:
        """Activations that each sequence gives: [count] int64."""
        return self.lengths - self.starts

    def split(self) -> list[list[int]]:
        return [part.tolist() for part in self.ids.split(self.lengths.tolist())]

    def save(self, folder: Path) -> None:
        """Write the sequences atomically, for a run that is resumed."""
        with atomic_folder(folder) as draft:
            (draft / "sources.txt").write_text("\n".join(self.names), encoding="utf-8")
            save_file({name: getattr(self, name) for name in _FIELDS}, draft / _FILE)

    @classmethod
    def load(cls, folder: Path) -> "TokenSequences":
        """Read what `save` wrote.

        Raises:
            MicroEditError: missing or damaged.
        """
        path = folder / _FILE
        tensors = read_tensors(path)
        names = (folder / "sources.txt").read_text(encoding="utf-8").split("\n")
        return cls(
            names=tuple(names), **{name: expect(tensors, name, (None,), path) for name in _FIELDS}
        )


_FILE = "sequences.safetensors"
_FIELDS = ("ids", "lengths", "starts", "source", "held_out")


@dataclass
class _Piece:
    """One sequence before the sources' shares are settled."""

    source: str
    group: tuple[int, int]
    ids: list[int]


@dataclass
class _Builder:
    """Lays pieces end to end and remembers every prefix that it has seen."""

    ids: array = field(default_factory=lambda: array("i"))
    columns: dict[str, list[int]] = field(
        default_factory=lambda: {"lengths": [], "starts": [], "source": [], "held_out": []}
    )
    seen: set[int] = field(default_factory=set)

    def add(self, ids: list[int], source: int, held_out: bool) -> None:
        prefix, start = 0, 1
        for position, token in enumerate(ids):
            prefix = hash((prefix, token))
            if prefix in self.seen:
                start = max(start, position + 1)
            self.seen.add(prefix)
        if start >= len(ids):
            return
        self.ids.extend(ids)
        for name, value in zip(
            ("lengths", "starts", "source", "held_out"),
            (len(ids), start, source, held_out),
            strict=True,
        ):
            self.columns[name].append(value)


def build_sequences(
    sources: Sequence[Iterable[Text]],
    tokenizer: Any,
    tokens: int,
    length: int,
    heldout_share: float,
    seed: int,
) -> TokenSequences:
    """Cut the texts into sequences of at most `length`, about `tokens` in all.

    Every source has the same share of `tokens`; what a small one leaves goes to the others.
    Whole groups are held out, so that no text is held out in one form and trained in another.
    """
    pieces: dict[str, list[_Piece]] = {}
    for number, texts in enumerate(sources):
        for piece in _cut(texts, number, tokenizer, tokens, length):
            pieces.setdefault(piece.source, []).append(piece)
    sizes = {name: sum(len(p.ids) - 1 for p in found) for name, found in pieces.items()}
    shares = fill_shares(sizes, tokens)
    chosen = [p for name, found in pieces.items() for p in _take(found, shares[name])]
    held = _held_out_groups(chosen, heldout_share, seed)
    names = tuple(pieces)
    builder = _Builder()
    # Training text first: a prefix that both have counts as trained on.
    for piece in sorted(chosen, key=lambda p: p.group in held):
        builder.add(piece.ids, names.index(piece.source), piece.group in held)
    columns = {name: torch.tensor(column) for name, column in builder.columns.items()}
    return TokenSequences(
        ids=torch.tensor(builder.ids, dtype=torch.int32),
        lengths=columns["lengths"].long(),
        starts=columns["starts"].long(),
        source=columns["source"].long(),
        held_out=columns["held_out"].bool(),
        names=names,
    )


def fill_shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Equal shares of `total`, none above its size, what is left over shared again."""
    shares: dict[str, int] = {}
    left = total
    for rank, name in enumerate(sorted(sizes, key=lambda n: sizes[n])):
        shares[name] = min(sizes[name], left // (len(sizes) - rank))
        left -= shares[name]
    return shares


def special_prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a plain text (Llama's BOS), often none."""
    with_special = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def _cut(
    texts: Iterable[Text], number: int, tokenizer: Any, tokens: int, length: int
) -> Iterable[_Piece]:
    """Pieces of one source, at most about `tokens` for each of the names that it gives."""
    prefix = special_prefix(tokenizer)
    counts: dict[str, int] = {}
    everything = list(texts)
    for first in range(0, len(everything), _TEXTS_AT_ONCE):
        batch = everything[first : first + _TEXTS_AT_ONCE]
        batch = [text for text in batch if counts.get(text.source, 0) < tokens]
        if not batch:
            continue
        encoded = tokenizer([t.content for t in batch], add_special_tokens=False).input_ids
        for text, ids in zip(batch, encoded, strict=True):
            lead = [] if text.is_chat else prefix
            step = max(1, length - len(lead))
            for start in range(0, len(ids), step):
                piece = [*lead, *ids[start : start + step]]
                if len(piece) >= _MIN_TOKENS:
                    counts[text.source] = counts.get(text.source, 0) + len(piece) - 1
                    yield _Piece(text.source, (number, text.group), piece)


def _take(pieces: list[_Piece], tokens: int) -> list[_Piece]:
    taken, count = [], 0
    for piece in pieces:
        if count >= tokens:
            break
        taken.append(piece)
        count += len(piece.ids) - 1
    return taken


def _held_out_groups(pieces: list[_Piece], share: float, seed: int) -> set[tuple[int, int]]:
    """A share of the groups of every kind, at least one where a kind has two.

    A group's kind is the sources that it has texts in: (self turns, self turns (chat)), say.
    """
    sources: dict[tuple[int, int], set[str]] = {}
    for piece in pieces:
        sources.setdefault(piece.group, set()).add(piece.source)
    kinds: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for group, names in sources.items():
        kinds.setdefault(tuple(sorted(names)), []).append(group)
    held: set[tuple[int, int]] = set()
    for kind, groups in kinds.items():
        count = min(len(groups) - 1, math.ceil(share * len(groups)))
        held.update(random.Random(f"{seed} held out {kind}").sample(sorted(groups), count))
    return held
