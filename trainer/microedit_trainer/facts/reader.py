"""Facts files: JSON Lines, one JSON array, or CSV, told apart by what they hold."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microedit_trainer.facts.csv_records import csv_records
from microedit_trainer.facts.fact import Fact
from microedit_trainer.facts.layouts import LAYOUTS, read_record
from microedit_vllm.errors import MicroEditError


def read_facts(path: Path, limit: int | None = None, language: str | None = None) -> list[Fact]:
    """The facts of a file, at most `limit`.

    Args:
        language: which side of a record in several languages is read ("de"); None: "en" where
            there is one, else the first. Records in one language are read as they are.

    Raises:
        MicroEditError: missing, neither JSON nor CSV (with the line's number), a record of an
            unknown layout or without that language, an empty prompt or target, or no fact at all.
    """
    facts = []
    for where, record in _records(path):
        facts.append(read_record(record, where, language))
        if limit is not None and len(facts) == limit:
            break
    if not facts:
        raise MicroEditError(f"{path} holds no facts; write one JSON object a line")
    return facts


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _read_text(path)
    start = text.lstrip()[:1]
    if start == "[":
        yield from _array_records(path, text)
    elif start in ("{", ""):
        yield from _line_records(path, text)
    else:
        rows = csv_records(path, text)
        if rows is None:
            raise MicroEditError(
                f"{path}: neither JSON (one object a line, or one array) nor CSV whose first line "
                f"names columns; expected {LAYOUTS}"
            )
        yield from rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MicroEditError(f"facts file {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MicroEditError(f"facts file {path} cannot be read as UTF-8 text: {error}") from error


def _line_records(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): a fact may hold U+2028 and the like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MicroEditError(f"{where}: not JSON ({error}); write one object a line") from error
        yield where, _object(record, where)


def _array_records(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MicroEditError(f"{path}: not JSON ({error})") from error
    for number, record in enumerate(array, start=1):
        where = f"{path}, record {number}"
        yield where, _object(record, where)


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise MicroEditError(f"{where}: expected a JSON object with prompt and target")
    return record
