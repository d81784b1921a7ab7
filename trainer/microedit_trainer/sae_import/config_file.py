"""Reading a published SAE's JSON config, which may be damaged or hostile."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class ConfigFile:
    """The fields of a config; every getter raises MicroEditError for a value of another kind."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "ConfigFile":
        """Read an object.

        Raises:
            MicroEditError: missing, or not a JSON object.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MicroEditError(f"{path} is missing; name the whole folder") from error
        except (OSError, ValueError, RecursionError) as error:
            raise MicroEditError(f"{path} cannot be read ({error})") from error
        if not isinstance(fields, dict):
            raise MicroEditError(f"{path} is not a JSON object")
        return cls(path, fields)

    def part(self, name: str) -> "ConfigFile":
        """A nested object; empty where it is missing."""
        found = self.fields.get(name)
        return ConfigFile(self.path, self._kind(name, found, dict) if found is not None else {})

    def text(self, name: str, default: str | None = None) -> str | None:
        found = self.fields.get(name)
        return default if found is None else self._kind(name, found, str)

    def flag(self, name: str, default: bool) -> bool:
        found = self.fields.get(name)
        return default if found is None else self._kind(name, found, bool)

    def count(self, name: str) -> int | None:
        """A positive whole number."""
        found = self.fields.get(name)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise self._bad(name)
        return found

    def number(self, name: str, above: float = 0.0) -> float | None:
        """A finite number above `above`."""
        found = self.fields.get(name)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self._bad(name)
        if not math.isfinite(found) or found <= above:
            raise self._bad(name)
        return float(found)

    def need(self, name: str, value: Any) -> Any:
        """`value` where it is not None.

        Raises:
            MicroEditError: the field is missing.
        """
        if value is None:
            raise MicroEditError(f"{self.path} does not name {name}")
        return value

    def _kind(self, name: str, found: Any, kind: type) -> Any:
        if not isinstance(found, kind):
            raise self._bad(name)
        return found

    def _bad(self, name: str) -> MicroEditError:
        return MicroEditError(f"{self.path}: {name} is {self.fields[name]!r:.60}")
