"""z of prompts by what they are: held while there is room, read back from a folder, or computed."""

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from microedit_trainer.contexts import PromptTokens
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.solvers.resume import write_checkpoint
from microedit_trainer.stored_residuals import StoredPrompt, residuals_at, store_residuals
from microedit_vllm.artifact import fingerprint_model

# What may be held for prompts that come again: some 10,000 short ones of a small model.
HELD_BYTES = 1 << 29
# Prompts that are computed, and written, together: what a stopped run loses.
TOGETHER = 256

# Tokens of a prompt and of its answer.
Ids = tuple[tuple[int, ...], tuple[int, ...]]
# Shown how many prompts are done, and of how many.
Shown = Callable[[int, int], None]


class ResidualStore:
    """Runs the layers up to the cut once for each prompt.

    Args:
        max_norm: residual norm above which a token is a sink.
        folder: keeps z, 2·d bytes a token in bf16, for later runs; None keeps nothing.
        room: bytes of the CPU's memory to hold prompts in; None: as many as there are.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        max_norm: float,
        folder: Path | None = None,
        room: int | None = HELD_BYTES,
    ) -> None:
        self._lm, self._layer, self._max_norm = lm, layer, max_norm
        self._held: dict[Ids, StoredPrompt] = {}
        self._room = math.inf if room is None else room
        self._kept = self._decisions = self._subjects = None
        if folder is not None:
            width = lm.hidden_size
            self._kept = _Folder(folder, "residuals", lm, layer, lambda p: (_length(p), width))
            self._decisions = _Folder(folder, "decisions", lm, layer, lambda p: (width,))
            self._subjects = _Folder(
                folder, "subjects", lm, layer, lambda p: (_count(p.subject_end), width)
            )

    def of(
        self, prompts: Sequence[PromptTokens], shown: Shown = lambda done, total: None
    ) -> list[StoredPrompt]:
        """The prompts with their residuals, on the model's device, in their order.

        Equal ones are run once.
        """
        # z does not depend on what is scored: a prompt under another scope is known as well.
        found = {
            prompt: replace(self._held[_ids(prompt)], tokens=prompt)
            for prompt in prompts
            if _ids(prompt) in self._held
        }
        if self._kept:
            unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
            for prompt, z in self._kept.read(unknown):
                found[prompt] = self._stored(prompt, z)
        missing = _missing(prompts, found)
        total = len(found) + len(missing)
        shown(len(found), total)
        for start in range(0, len(missing), TOGETHER):
            batch = missing[start : start + TOGETHER]
            stored = store_residuals(self._lm, self._layer, batch, self._max_norm)
            found.update(zip(batch, stored, strict=True))
            if self._kept:
                self._kept.write({s.tokens: s.z for s in stored})
            shown(len(found), total)
        for prompt, stored_prompt in found.items():
            self._hold(prompt, stored_prompt)
        return [found[prompt].to(self._lm.device) for prompt in prompts]

    def decisions_of(
        self, prompts: Sequence[PromptTokens], shown: Shown = lambda done, total: None
    ) -> Tensor:
        """z at the decision position of each prompt, and nothing else of it: [N, d].

        On the model's device, in its dtype; equal prompts are run once. At least one prompt.
        """
        return torch.stack(self._parts_of(prompts, _decision, self._decisions, shown))

    def subjects_of(
        self, prompts: Sequence[PromptTokens], shown: Shown = lambda done, total: None
    ) -> list[Tensor]:
        """The same of the last tokens of each prompt's subject, sinks left out: [S, d] each."""
        found = self._parts_of(prompts, _subject_end, self._subjects, shown)
        return [z[z.float().norm(dim=-1) <= self._max_norm] for z in found]

    def _parts_of(
        self,
        prompts: Sequence[PromptTokens],
        where: Callable[[PromptTokens], int | slice],
        kept: "_Folder | None",
        shown: Shown,
    ) -> list[Tensor]:
        """What z each prompt has there, read back from a folder or computed."""
        found = dict(kept.read(list(dict.fromkeys(prompts)))) if kept else {}
        missing = _missing(prompts, found)
        total = len(found) + len(missing)
        shown(len(found), total)
        for start in range(0, len(missing), TOGETHER):
            batch = missing[start : start + TOGETHER]
            parts = residuals_at(self._lm, self._layer, batch, where)
            found.update(zip(batch, parts, strict=True))
            if kept:
                kept.write(dict(zip(batch, parts, strict=True)))
            shown(len(found), total)
        return [found[prompt].to(self._lm.device) for prompt in prompts]

    def _stored(self, prompt: PromptTokens, z: Tensor) -> StoredPrompt:
        return StoredPrompt(prompt, z, z.float().norm(dim=-1) > self._max_norm)

    def _hold(self, prompt: PromptTokens, stored: StoredPrompt) -> None:
        """Remember a prompt; those that came first give way where there is no room."""
        if _ids(prompt) in self._held:
            return
        self._held[_ids(prompt)] = stored.to("cpu")
        self._room -= stored.z.nbytes
        while self._room < 0 and self._held:
            self._room += self._held.pop(next(iter(self._held))).z.nbytes


def _ids(prompt: PromptTokens) -> Ids:
    return prompt.prompt_ids, prompt.answer_ids


def _decision(prompt: PromptTokens) -> int:
    return prompt.edit_from


def _subject_end(prompt: PromptTokens) -> slice:
    return prompt.subject_end


def _count(positions: slice) -> int:
    return int(positions.stop - positions.start)


def _length(prompt: PromptTokens) -> int:
    return len(prompt.prompt_ids) + len(prompt.answer_ids)


def _missing(prompts: Sequence[PromptTokens], found: Container[PromptTokens]) -> list[PromptTokens]:
    """The others, once each, those of like lengths together, so that little is padded."""
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
    return sorted(missing, key=_length)


class _Folder:
    """Files of some hundred prompts' z each, by a hash of all that z depends on.

    Args:
        kind: how the files' names begin.
        shape_of: what is kept of a prompt.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        lm: LanguageModel,
        layer: int,
        shape_of: Callable[[PromptTokens], tuple[int, ...]],
    ) -> None:
        self._folder, self._kind, self._dtype = folder, kind, lm.dtype
        self._shape_of = shape_of
        self._origin = json.dumps([fingerprint_model(lm.folder), str(lm.dtype), layer])
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob(f"{kind}-*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._where.update(dict.fromkeys(file.keys(), path))
            except (OSError, SafetensorError):
                continue  # a damaged file counts as none

    def read(self, prompts: Sequence[PromptTokens]) -> Iterator[tuple[PromptTokens, Tensor]]:
        """What is kept of those that are there and whole, file by file."""
        by_file: dict[Path, list[tuple[str, PromptTokens]]] = {}
        for prompt in prompts:
            key = self._key(prompt)
            if key in self._where:
                by_file.setdefault(self._where[key], []).append((key, prompt))
        for path, wanted in by_file.items():
            try:
                with safe_open(path, "pt") as file:
                    found = [(prompt, file.get_tensor(key)) for key, prompt in wanted]
            except (OSError, SafetensorError):
                continue
            for prompt, z in found:
                if z.shape == self._shape_of(prompt) and z.dtype == self._dtype:
                    yield prompt, z

    def write(self, found: Mapping[PromptTokens, Tensor]) -> None:
        tensors = {self._key(prompt): z for prompt, z in found.items()}
        path = self._folder / f"{self._kind}-{next(iter(tensors))}.safetensors"
        write_checkpoint(path, tensors)
        self._where.update(dict.fromkeys(tensors, path))

    def _key(self, prompt: PromptTokens) -> str:
        own = json.dumps([self._origin, prompt.prompt_ids, prompt.answer_ids])
        return hashlib.sha256(own.encode()).hexdigest()[:32]
