"""The last solution of a ridge regression, kept so that the next one starts from it."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from microedit_trainer.solvers.resume import read_checkpoint, write_checkpoint


class KeptSolution:
    """One change's D by decoder row, in a folder that outlives the run: 4·c·d bytes.

    It is a start, no result: whatever it is, the regression ends at its own solution.

    Args:
        folder: None keeps nothing.
        name: of the change.
        origin: the model, layer and SAE that it is for.
    """

    def __init__(self, folder: Path | None, name: str, origin: str) -> None:
        digest = hashlib.sha256(origin.encode()).hexdigest()[:16]
        self._path = folder and folder / f"solution-{name}-{digest}.safetensors"

    def start(self, rows: Tensor, width: int) -> Tensor | None:
        """D over the given rows, ascending [c] → [c, d] fp32; 0 for rows that it did not have."""
        kept = read_checkpoint(self._path) if self._path else None
        if not kept or kept.keys() != {"rows", "values"}:
            return None
        old, values = kept["rows"].to(rows.device), kept["values"].to(rows.device)
        if values.shape != (len(old), width) or not len(old):
            return None
        found = values.new_zeros(len(rows), width)
        place = torch.full((1 + int(max(old.max(), rows.max())),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        known = place[old] >= 0
        found[place[old[known]]] = values[known]
        return found

    def keep(self, rows: Tensor, change: Tensor) -> None:
        """Take the place of the solution before."""
        if self._path:
            write_checkpoint(self._path, {"rows": rows, "values": change})
