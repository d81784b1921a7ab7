"""The SAE folder, in sparsify's format: `cfg.json` and `sae.safetensors`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from microedit_kernels.sparse_decode import decode
from microedit_kernels.topk_encode import topk_encode
from microedit_vllm.artifact.atomic import atomic_folder
from microedit_vllm.artifact.tensors import expect, hash_file, read_tensors
from microedit_vllm.errors import MicroEditError

WEIGHTS = "sae.safetensors"
CONFIG = "cfg.json"
REPORT = "microedit_report.json"

# sparsify's fields that change what an SAE computes. multi_topk does not: it is a training loss.
_READ_AS = {
    "activation": "topk",
    "transcode": False,
    "signed": False,
    "skip_connection": False,
    "embed_skip": False,
    "gram_lookup": False,
}


@dataclass(frozen=True)
class SparseAutoencoder:
    """A Top-k SAE of one layer's residual stream (sparsify: ReLU, then Top-k; b_dec subtracted).

    Attributes:
        W_enc: [n, d] fp32, one row per latent; b_enc: [n]; W_dec: [n, d]; b_dec: [d].
        k: latents kept per token.
        fingerprint: SHA-256 of the weights' file and k; empty before the SAE was saved.
        report: what training measured (layer, FVU per text source, `max_norm` of a token that is
            not a sink, …); empty for an SAE from elsewhere.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    k: int
    fingerprint: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def num_latents(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 7: top_acts and top_indices, each [..., k]."""
        return topk_encode(z, self.W_enc, self.b_enc, self.k, self.b_dec)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Eq. 8 with the unedited decoder: ẑ₀, [..., d] fp32."""
        return decode(top_acts, top_indices, self.W_dec, self.b_dec)

    def save(self, folder: Path) -> "SparseAutoencoder":
        """Write the folder atomically; returns the SAE with its fingerprint."""
        with atomic_folder(folder) as draft:
            tensors = {
                "encoder.weight": self.W_enc,
                "encoder.bias": self.b_enc,
                "W_dec": self.W_dec,
                "b_dec": self.b_dec,
            }
            save_file({name: t.contiguous() for name, t in tensors.items()}, draft / WEIGHTS)
            config = {
                "activation": "topk",
                "expansion_factor": max(1, self.num_latents // self.d_in),
                "normalize_decoder": True,
                "num_latents": self.num_latents,
                "k": self.k,
                "multi_topk": False,
                "skip_connection": False,
                "transcode": False,
                "d_in": self.d_in,
            }
            (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            if self.report:
                (draft / REPORT).write_text(json.dumps(self.report, indent=2) + "\n")
        return SparseAutoencoder.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "SparseAutoencoder":
        """Read and check a folder.

        Raises:
            MicroEditError: something is missing, damaged, or not a Top-k SAE of the residual
                stream in this format.
        """
        config = _read_json(folder / CONFIG)
        k, d = config.get("k"), config.get("d_in")
        if not isinstance(k, int) or not isinstance(d, int) or k < 1 or d < 1:
            raise MicroEditError(f"{folder / CONFIG} does not name k and d_in as positive numbers")
        for name, wanted in _READ_AS.items():
            if config.get(name, wanted) != wanted:
                raise MicroEditError(
                    f"{folder / CONFIG}: {name} is {config[name]!r}; editing needs a Top-k SAE "
                    "of the residual stream"
                )
        path = folder / WEIGHTS
        tensors = read_tensors(path)
        W_enc = expect(tensors, "encoder.weight", (None, d), path)
        n = W_enc.shape[0]
        if k > n:
            raise MicroEditError(f"{folder / CONFIG}: k = {k} exceeds the {n} latents")
        report = _read_json(folder / REPORT) if (folder / REPORT).exists() else {}
        return cls(
            W_enc=W_enc.float(),
            b_enc=expect(tensors, "encoder.bias", (n,), path).float(),
            W_dec=expect(tensors, "W_dec", (n, d), path).float(),
            b_dec=expect(tensors, "b_dec", (d,), path).float(),
            k=k,
            fingerprint=f"{hash_file(path)}-k{k}",
            report=report,
        )

    def to(self, device: torch.device | str) -> "SparseAutoencoder":
        """The same SAE with its tensors on another device."""
        return SparseAutoencoder(
            W_enc=self.W_enc.to(device),
            b_enc=self.b_enc.to(device),
            W_dec=self.W_dec.to(device),
            b_dec=self.b_dec.to(device),
            k=self.k,
            fingerprint=self.fingerprint,
            report=self.report,
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MicroEditError(
            f"{path.parent} is not an SAE folder: {path.name} is missing; "
            "make one with `microedit sae train`"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise MicroEditError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise MicroEditError(f"{path} is not a JSON object")
    return content
