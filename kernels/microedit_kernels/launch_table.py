"""Launch configurations by shape: measured once (`benchmarks/tune_kernels.py`), looked up since.

Nothing is tuned while serving. `launch_table.json` has a list per operator of (most, settings): the
settings serve up to `most` rows of a batch, the last ones any number.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

Settings = dict[str, Any]


@cache
def _table() -> dict[str, Any]:
    text = files(__package__).joinpath("launch_table.json").read_text()
    table: dict[str, Any] = json.loads(text)
    return table


def settings(operator: str, rows: int) -> Settings:
    """The settings of an operator for batches of that many rows.

    Raises:
        KeyError: the table has no such operator.
    """
    lines: list[tuple[int, Settings]] = _table()[operator]
    return next((found for most, found in lines if rows <= most), lines[-1][1])
