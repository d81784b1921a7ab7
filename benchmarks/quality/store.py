"""Results on disk, one JSON file a row, so that a stopped run goes on and a later one reuses."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from microedit_vllm.artifact.atomic import write_atomically

Figures = dict[str, Any]


def digest(described: Any) -> str:
    """A short name of whatever JSON, dataclasses and manifest parts can say."""
    text = json.dumps(described, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, BaseModel):
        return value.model_dump()
    raise TypeError(f"{type(value).__name__} has no place in a description")


@dataclass(frozen=True)
class ResultStore:
    """Figures by what they were measured on, a file a row in `folder`."""

    folder: Path

    def get(self, kind: str, described: Any, measure: Callable[[], Figures]) -> Figures:
        """The stored figures of `described`, measured first where there are none.

        Args:
            kind: what is measured ("scores"), which may have several kinds of figures.
            described: all that the figures depend on.
        """
        path = self.folder / f"{kind}-{digest(described)}.json"
        if not path.exists():
            whole = {"described": described, "figures": measure()}
            text = json.dumps(whole, indent=1, default=_plain, ensure_ascii=False)
            write_atomically(path, text.encode() + b"\n")
        return json.loads(path.read_text(encoding="utf-8"))["figures"]
