"""The edit set: what the trainer writes and the server reads."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from microedit_vllm.artifact.atomic import atomic_folder
from microedit_vllm.artifact.golden_prompts import (
    GoldenPrompt,
    read_golden_prompts,
    write_golden_prompts,
)
from microedit_vllm.artifact.manifest import Manifest, read_manifest
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.artifact.tensors import expect, expect_indices, read_tensors
from microedit_vllm.errors import MicroEditError

MANIFEST = "microedit.json"
EDITS = "edits.safetensors"
GOLDEN = "golden.safetensors"
GOLDEN_PROMPTS = "golden_prompts.json"
FACTS = "facts.jsonl"
VALUES_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class DecoderChange:
    """ΔW_dec, only the rows that change: indices [c] int64 ascending, values [c, d]."""

    indices: Tensor
    values: Tensor

    def to(self, device: torch.device | str) -> "DecoderChange":
        return DecoderChange(self.indices.to(device), self.values.to(device))

    @property
    def num_bytes(self) -> int:
        """Bytes of indices and values."""
        return sum(t.numel() * t.element_size() for t in (self.indices, self.values))


@dataclass(frozen=True)
class Golden:
    """A few residuals and what the SAE and the set make of them (all fp32 but the indices).

    z [g, d], top_indices [g, k], z_hat = ẑ₀ + δ_score [g, d], dist and dist0 [g],
    edited [g, d] = what replaces z from the decision position on, carried [d] = what the g tokens
    carry there, each with the same weight; None where the set has no carried change.
    """

    z: Tensor
    top_indices: Tensor
    z_hat: Tensor
    dist: Tensor
    dist0: Tensor
    edited: Tensor
    carried: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @classmethod
    def none(cls) -> "Golden":
        """No golden activations yet: a set in the making, which cannot be loaded once saved."""
        nothing = torch.empty(0)
        return cls(*[nothing] * 6)


@dataclass(frozen=True)
class EditSet:
    """A trained edit set in memory.

    Attributes:
        scoring: the change that scored tokens are reconstructed with.
        edit: the change that is added from the decision position on; the very same object as
            `scoring` in the paper's own form.
        carried: the change that the scored tokens carry to the decision position, where a set has
            one (see `microedit_kernels.carried_change`).
        facts: one JSON object per fact, with its own ARD and scores.
        golden_prompts: what `microedit verify` sends; empty in sets of older releases.
    """

    manifest: Manifest
    scoring: DecoderChange
    edit: DecoderChange
    golden: Golden
    facts: list[dict[str, Any]] = field(default_factory=list)
    golden_prompts: tuple[GoldenPrompt, ...] = ()
    carried: DecoderChange | None = None

    @property
    def is_shared(self) -> bool:
        """Whether one change does both jobs (the paper's form)."""
        return self.edit is self.scoring

    @property
    def changes(self) -> dict[str, DecoderChange]:
        """Each change once, by its name in the file."""
        changes = {"scoring": self.scoring}
        if not self.is_shared:
            changes["edit"] = self.edit
        if self.carried is not None:
            changes["carried"] = self.carried
        return changes

    def save(self, folder: Path) -> None:
        """Write the folder atomically; an older set there stays until the new one is whole."""
        with atomic_folder(folder) as draft:
            (draft / MANIFEST).write_text(self.manifest.to_json(), encoding="utf-8")
            save_file(self._change_tensors(), draft / EDITS)
            golden = {name: t.contiguous() for name, t in self.golden.tensors.items()}
            save_file(golden, draft / GOLDEN)
            lines = (json.dumps(fact, ensure_ascii=False) + "\n" for fact in self.facts)
            (draft / FACTS).write_text("".join(lines), encoding="utf-8")
            write_golden_prompts(self.golden_prompts, draft / GOLDEN_PROMPTS)

    def _change_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, change in self.changes.items():
            tensors[f"{name}.indices"] = change.indices.contiguous()
            tensors[f"{name}.values"] = change.values.contiguous()
        return tensors

    @classmethod
    def load(cls, folder: Path) -> "EditSet":
        """Read and check a folder; nothing in it is trusted.

        Raises:
            MicroEditError: something is missing, damaged, inconsistent or of another version.
        """
        if not folder.is_dir():
            raise MicroEditError(f"{folder} is not a folder; make a set with `microedit edit`")
        manifest = read_manifest(folder / MANIFEST)
        tensors = read_tensors(folder / EDITS)
        n, d = manifest.sae.num_latents, manifest.model.hidden_size
        scoring = _read_change(tensors, "scoring", n, d, folder / EDITS)
        shared = "edit.indices" not in tensors and "edit.values" not in tensors
        edit = scoring if shared else _read_change(tensors, "edit", n, d, folder / EDITS)
        carried = None
        if manifest.carries:
            carried = _read_change(tensors, "carried", n, d, folder / EDITS)
        golden = _read_golden(folder / GOLDEN, manifest)
        facts = _read_facts(folder / FACTS)
        prompts = read_golden_prompts(folder / GOLDEN_PROMPTS)
        return cls(manifest, scoring, edit, golden, facts, prompts, carried)

    def sae_folder(self, folder: Path, override: Path | None = None) -> Path:
        """Where this set's SAE lies: `override`, else the manifest's path seen from `folder`."""
        return override if override is not None else folder / self.manifest.sae.path

    def check_sae(self, sae: SparseAutoencoder, where: Path) -> None:
        """Refuse an SAE that is not the one the set was made with.

        Raises:
            MicroEditError: the fingerprints differ.
        """
        if sae.fingerprint != self.manifest.sae.fingerprint:
            raise MicroEditError(
                f"the SAE in {where} is not the one that the edit set was made with "
                f"(fingerprint {sae.fingerprint[:12]}, expected "
                f"{self.manifest.sae.fingerprint[:12]}); name the right folder or edit again"
            )

    def check_model(self, fingerprint: str, name: str) -> None:
        """Refuse a base model that is not the one the set was made for.

        Raises:
            MicroEditError: the fingerprints differ.
        """
        if fingerprint != self.manifest.model.fingerprint:
            raise MicroEditError(
                f"the edit set was made for {self.manifest.model.name} (fingerprint "
                f"{self.manifest.model.fingerprint[:12]}), not for {name} "
                f"({fingerprint[:12]}); serve that model or edit this one"
            )


def relative_sae_path(sae: Path, folder: Path) -> str:
    """How a set in `folder` names its SAE: relative, so that both can move together."""
    return os.path.relpath(sae.resolve(), folder.resolve())


def _read_change(
    tensors: dict[str, Tensor], name: str, n: int, d: int, path: Path
) -> DecoderChange:
    indices = expect_indices(tensors, f"{name}.indices", n, path)
    values = expect(tensors, f"{name}.values", (len(indices), d), path)
    if not values.is_floating_point():
        raise MicroEditError(f"{path}: tensor '{name}.values' is not of a float type")
    return DecoderChange(indices, values)


def _read_golden(path: Path, manifest: Manifest) -> Golden:
    tensors = read_tensors(path)
    d = manifest.model.hidden_size
    z = expect(tensors, "z", (None, d), path).float()
    g = len(z)
    if g == 0:
        raise MicroEditError(f"{path} holds no golden activations; make the set again")
    return Golden(
        z=z,
        top_indices=expect(tensors, "top_indices", (g, manifest.sae.k), path),
        z_hat=expect(tensors, "z_hat", (g, d), path).float(),
        dist=expect(tensors, "dist", (g,), path).float(),
        dist0=expect(tensors, "dist0", (g,), path).float(),
        edited=expect(tensors, "edited", (g, d), path).float(),
        carried=expect(tensors, "carried", (d,), path).float() if manifest.carries else None,
    )


def _read_facts(path: Path) -> list[dict[str, Any]]:
    try:
        # Not splitlines(): a fact may hold U+2028 and the like.
        lines = path.read_text(encoding="utf-8").split("\n")
        facts = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise MicroEditError(f"{path} cannot be read ({error}); make the set again") from error
    if not all(isinstance(fact, dict) for fact in facts):
        raise MicroEditError(f"{path} holds something else than JSON objects; make the set again")
    return facts
