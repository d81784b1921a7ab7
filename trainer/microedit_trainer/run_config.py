"""Settings for a model that many runs share: the shipped ones, and files of the same form.

A file is a JSON object with any of

- `description`: a text that is shown,
- `sae`: `layer`, `width` and `k` of the SAE that the settings are for; `microedit sae train` takes
  them, `microedit edit` compares the SAE that it is given with them,
- `train`: further options of `microedit sae train` by name,
- `edit`: options of `microedit edit` by name. `tau` may be a list of [facts, τ]: each τ holds from
  so many facts on.
"""

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from microedit_vllm.errors import MicroEditError

_SECTIONS = ("sae", "train", "edit")
_SAE = ("layer", "width", "k")


@dataclass(frozen=True)
class RunConfig:
    """Defaults for the options of a command.

    Attributes:
        name: as it was asked for.
        sae: `layer`, `width`, `k`, as far as they are named.
        train, edit: options by name, underscores between words; `edit` without `tau`.
        taus: [facts, τ] in order; empty where the config names no τ.
    """

    name: str
    description: str = ""
    sae: dict[str, int] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    edit: dict[str, Any] = field(default_factory=dict)
    taus: tuple[tuple[int, float], ...] = ()

    @classmethod
    def find(cls, name: str) -> "RunConfig":
        """A shipped config by name, or a JSON file's.

        Raises:
            MicroEditError: neither of the two, or a file that is not of this form.
        """
        if name in shipped_configs():
            text = files("microedit_trainer").joinpath(f"data/configs/{name}.json").read_text()
            return cls._read(name, text)
        path = Path(name)
        if not path.is_file():
            raise MicroEditError(
                f"there is no config {name}; known ones are {', '.join(shipped_configs())}, "
                "and the name of a JSON file is taken too"
            )
        try:
            return cls._read(name, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise MicroEditError(f"config {name} cannot be read ({error})") from error

    @classmethod
    def _read(cls, name: str, text: str) -> "RunConfig":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MicroEditError(f"config {name} is not JSON ({error})") from error
        known = ("description", *_SECTIONS)
        _check_names(name, "", content, known)
        sections = {section: content.get(section, {}) for section in _SECTIONS}
        _check_names(name, "sae: ", sections["sae"], _SAE)
        for key, value in sections["sae"].items():
            if type(value) is not int or value < 0:
                raise MicroEditError(f"config {name}: sae: {key} is {value!r}; it must be a number")
        edit, train = (_options(name, s, sections[s]) for s in ("edit", "train"))
        taus = _taus(name, edit.pop("tau", []))
        return cls(name, str(content.get("description", "")), sections["sae"], train, edit, taus)

    def tau(self, facts: int) -> float | None:
        """τ for so many facts; None where the config leaves it to calibration."""
        return next((tau for least, tau in reversed(self.taus) if facts >= least), None)

    def other_sae(self, layer: int | None, width: int, k: int) -> list[str]:
        """In what an SAE differs from the one that the settings are for: ["k = 64, not 192"]."""
        given = {"layer": layer, "width": width, "k": k}
        return [
            f"{name} = {given[name]}, not {wanted}"
            for name, wanted in self.sae.items()
            if given[name] is not None and given[name] != wanted
        ]


def shipped_configs() -> list[str]:
    """Names of the configs that ship with the trainer."""
    folder = files("microedit_trainer").joinpath("data/configs")
    return sorted(Path(entry.name).stem for entry in folder.iterdir())


def _check_names(config: str, where: str, found: object, known: tuple[str, ...]) -> None:
    if not isinstance(found, dict):
        raise MicroEditError(f"config {config}: {where or 'it '}is not a JSON object")
    for key in found:
        if key not in known:
            raise MicroEditError(
                f"config {config}: {where}{key} is not known; known are {', '.join(known)}"
            )


def _options(config: str, section: str, found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise MicroEditError(f"config {config}: {section} is not a JSON object")
    return {key.replace("-", "_"): value for key, value in found.items()}


def _taus(config: str, found: Any) -> tuple[tuple[int, float], ...]:
    pairs = found if isinstance(found, list) else [[1, found]]
    for pair in pairs:
        numbers = isinstance(pair, list) and len(pair) == 2
        if not numbers or not all(type(part) in (int, float) and part > 0 for part in pair):
            raise MicroEditError(
                f"config {config}: edit: tau must be a number or a list of [facts, τ]"
            )
    return tuple(sorted((int(facts), float(tau)) for facts, tau in pairs))
