"""The serving setting: which edit set, which SAE; read and checked before an engine starts.

Knows no vLLM. The setting travels in vLLM's `additional_config` under the key `microedit`:
`LLM(model, additional_config={"microedit": {"edit_set": "DIR", "sae": "DIR"}})`, where `sae` may
be left out; `vllm serve MODEL --microedit DIR [--microedit-sae DIR]` writes the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder, fingerprint_model
from microedit_vllm.artifact.edit_set import MANIFEST
from microedit_vllm.artifact.manifest import Manifest, read_manifest
from microedit_vllm.errors import MicroEditError

KEY = "microedit"
# `Manifest.serve_flags` of such a set, as arguments of `vllm.LLM`.
SEQUENCE_ARGUMENTS = {"enable_chunked_prefill": False, "enable_prefix_caching": False}


@dataclass(frozen=True)
class ServingConfig:
    """What the user set.

    Attributes:
        edit_set: the edit set's folder.
        sae: the SAE's folder; None takes the one that the edit set names.
        layer: the decoder layer, known once the set was read. It is part of the setting because
            vLLM hashes the setting into its compile cache's key, and the compiled graph holds the
            patch at that layer.
    """

    edit_set: Path
    sae: Path | None = None
    layer: int | None = None

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "ServingConfig | None":
        """The setting in vLLM's `additional_config`, None where it is absent.

        Raises:
            MicroEditError: it is there, but not as described above.
        """
        if not isinstance(additional_config, dict) or KEY not in additional_config:
            return None
        value = additional_config[KEY]
        if not isinstance(value, dict):
            raise MicroEditError(
                f"additional_config[{KEY!r}] must be a dict such as {{'edit_set': 'FOLDER'}}, "
                f"not {value!r}"
            )
        unknown = sorted(set(value) - {"edit_set", "sae", "layer"})
        if unknown:
            raise MicroEditError(
                f"additional_config[{KEY!r}] has an unknown key {unknown[0]!r}; "
                "known are 'edit_set' and 'sae'"
            )
        edit_set, sae = value.get("edit_set"), value.get("sae")
        if not isinstance(edit_set, str | Path) or not str(edit_set):
            raise MicroEditError(f"additional_config[{KEY!r}] does not name the folder 'edit_set'")
        if sae is not None and not isinstance(sae, str | Path):
            raise MicroEditError(f"additional_config[{KEY!r}]: 'sae' must be a folder's path")
        layer = value.get("layer")
        return cls(Path(edit_set), Path(sae) if sae else None, layer)

    def to_dict(self, layer: int) -> dict[str, Any]:
        """The setting as it goes to the other processes: absolute paths, and the layer."""
        return {
            "edit_set": str(self.edit_set.resolve()),
            "sae": str(self.sae.resolve()) if self.sae is not None else None,
            "layer": layer,
        }

    def load_manifest(self) -> Manifest:
        """The edit set's manifest alone.

        Raises:
            MicroEditError: see `read_manifest`.
        """
        return read_manifest(self.edit_set / MANIFEST)

    def load(self, device: torch.device | str = "cpu") -> EditOperator:
        """Read the edit set and its SAE, and prove that they compute what the trainer computed.

        Raises:
            MicroEditError: a folder is missing or damaged, of another version or of another SAE,
                of a kind that cannot be served, or its golden activations do not reproduce.
        """
        edit_set = EditSet.load(self.edit_set)
        where = edit_set.sae_folder(self.edit_set, self.sae)
        sae = SparseAutoencoder.load(where)
        edit_set.check_sae(sae, where)
        operator = EditOperator.build(edit_set, sae.to(device))
        operator.check_golden()
        return operator


def check_model(
    edit_set: EditSet, folder: Path, name: str, hidden_size: int, num_layers: int
) -> None:
    """Refuse a model that the set was not made for.

    Args:
        folder: the model's local folder, with its safetensors.
        name: what the user calls the model.
        hidden_size, num_layers: of the model as it is going to be served.

    Raises:
        MicroEditError: layer, width or fingerprint do not fit.
    """
    manifest = edit_set.manifest
    if manifest.layer >= num_layers:
        raise MicroEditError(
            f"the edit set is for layer {manifest.layer}, {name} has only {num_layers} layers; "
            f"serve {manifest.model.name} or edit this model"
        )
    if manifest.model.hidden_size != hidden_size:
        raise MicroEditError(
            f"the edit set is for a residual stream of {manifest.model.hidden_size} numbers, "
            f"{name} has {hidden_size}; serve {manifest.model.name} or edit this model"
        )
    edit_set.check_model(fingerprint_model(folder), name)


def summary(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """The loaded set in a few fields: what the start-up line and `GET /v1/microedit` show."""
    decision = manifest.decision
    return {
        "edit_set": folder.resolve().name,
        "facts": manifest.facts,
        "layer": manifest.layer,
        "k": manifest.sae.k,
        "decision": decision.statistic,
        "tau": decision.tau,
        "scope": str(decision.scope),
    }
