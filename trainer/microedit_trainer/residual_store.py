"""z of prompts by what they are: held while there is room, read back from a folder, or computed."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from microedit_trainer.contexts import PromptTokens
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.solvers.resume import write_checkpoint
from microedit_trainer.stored_residuals import StoredPrompt, store_residuals
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
        self._kept = _Folder(folder, lm, layer) if folder is not None else None

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
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        # Of like lengths together, so that little is padded.
        missing.sort(key=lambda prompt: len(prompt.prompt_ids) + len(prompt.answer_ids))
        total = len(found) + len(missing)
        shown(len(found), total)
        for start in range(0, len(missing), TOGETHER):
            batch = missing[start : start + TOGETHER]
            stored = store_residuals(self._lm, self._layer, batch, self._max_norm)
            found.update(zip(batch, stored, strict=True))
            if self._kept:
                self._kept.write(stored)
            shown(len(found), total)
        for prompt, stored_prompt in found.items():
            self._hold(prompt, stored_prompt)
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


class _Folder:
    """Files of some hundred prompts' z each, by a hash of all that z depends on."""

    def __init__(self, folder: Path, lm: LanguageModel, layer: int) -> None:
        self._folder = folder
        self._shape = (lm.dtype, lm.hidden_size)
        self._origin = json.dumps([fingerprint_model(lm.folder), str(lm.dtype), layer])
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("residuals-*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._where.update(dict.fromkeys(file.keys(), path))
            except (OSError, SafetensorError):
                continue  # a damaged file counts as none

    def read(self, prompts: Sequence[PromptTokens]) -> Iterator[tuple[PromptTokens, Tensor]]:
        """z [P + A, d] of those that are there and whole, file by file."""
        by_file: dict[Path, list[tuple[str, PromptTokens]]] = {}
        for prompt in prompts:
            key = self._key(prompt)
            if key in self._where:
                by_file.setdefault(self._where[key], []).append((key, prompt))
        dtype, width = self._shape
        for path, wanted in by_file.items():
            try:
                with safe_open(path, "pt") as file:
                    found = [(prompt, file.get_tensor(key)) for key, prompt in wanted]
            except (OSError, SafetensorError):
                continue
            for prompt, z in found:
                length = len(prompt.prompt_ids) + len(prompt.answer_ids)
                if z.shape == (length, width) and z.dtype == dtype:
                    yield prompt, z

    def write(self, stored: Sequence[StoredPrompt]) -> None:
        tensors = {self._key(s.tokens): s.z for s in stored}
        path = self._folder / f"residuals-{next(iter(tensors))}.safetensors"
        write_checkpoint(path, tensors)
        self._where.update(dict.fromkeys(tensors, path))

    def _key(self, prompt: PromptTokens) -> str:
        own = json.dumps([self._origin, prompt.prompt_ids, prompt.answer_ids])
        return hashlib.sha256(own.encode()).hexdigest()[:32]
