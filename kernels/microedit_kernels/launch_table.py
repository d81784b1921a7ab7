"""Launch configurations by shape: measured once (`benchmarks/tune_kernels.py`), looked up since.

Nothing is tuned while serving. `launch_table.json` has a list per operator of (most, settings): the
settings serve up to `most` rows of a batch, the last ones any number.
"""

import json
from importlib.resources import files
from typing import Any

Settings = dict[str, Any]
_loaded: dict[str, Any] = {}


def table() -> dict[str, Any]:
    """The whole table; read once."""
    if not _loaded:
        text = files(__package__).joinpath("launch_table.json").read_text()
        _loaded.update(json.loads(text))
    return dict(_loaded)


def replace_table(other: dict[str, Any]) -> None:
    """Use another one in this process: for measuring candidates."""
    _loaded.clear()
    _loaded.update(other)


def settings(operator: str, rows: int) -> Settings:
    """The settings of an operator for batches of that many rows.

    Raises:
        KeyError: the table has no such operator.
    """
    lines: list[tuple[int, Settings]] = table()[operator]
    return next((found for most, found in lines if rows <= most), lines[-1][1])
