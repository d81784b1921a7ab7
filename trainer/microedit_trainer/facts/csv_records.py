"""CSV with a header line as records: one field a column, like a JSON object's."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microedit_trainer.facts.layouts import NEEDED, is_known
from microedit_vllm.errors import MicroEditError

DELIMITERS = ",;\t"
# Columns that may stand several times, each cell one prompt: paraphrase, paraphrase_2, …
_REPEATED = re.compile(r"(paraphrase|locality|portability)s?(_answer)?_?(\d*)")


def csv_records(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]] | None:
    """(where, record) of each row; None where the first line names no known columns.

    Empty cells are left out, except those of needed fields. The delimiter is the one among comma,
    semicolon and tab at which the header names the columns of a known layout.

    Raises:
        MicroEditError: broken quotes, or a row with more or fewer cells than the header, by line.
    """
    for delimiter in DELIMITERS:
        header = _header(text, delimiter)
        if header and is_known(dict.fromkeys(header)):
            return _rows(path, text, delimiter)
    return None


def _header(text: str, delimiter: str) -> list[str] | None:
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            if any(cell.strip() for cell in row):
                return [name.strip().casefold() for name in row]
    except csv.Error:
        pass
    return None


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        # A quoted cell may hold line ends: a row is named by the line that it starts on.
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise MicroEditError(f"{where}: not CSV ({error}); check its quotes") from error
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [name.strip().casefold() for name in row]
            _check_header(header, where)
        elif len(row) != len(header):
            raise MicroEditError(
                f"{where}: {len(row)} cells, but the header names {len(header)} columns; put cells "
                "that hold the delimiter in quotes"
            )
        else:
            yield where, _record(header, row)


def _check_header(header: list[str], where: str) -> None:
    for name, count in Counter(header).items():
        if name and count > 1 and not _REPEATED.fullmatch(name):
            raise MicroEditError(f"{where}: the column {name!r} stands there {count} times")


def _record(header: list[str], row: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    prompts: dict[tuple[str, str], list[str]] = {}
    answers: dict[tuple[str, str], str] = {}
    for name, cell in zip(header, row, strict=True):
        repeated = _REPEATED.fullmatch(name)
        if repeated is None:
            if cell.strip() or any(name in names for names in NEEDED):
                record[name] = cell
        elif cell.strip():
            kind, is_answer, number = repeated.groups()
            if is_answer:
                answers[kind, number] = cell
            else:
                prompts.setdefault((kind, number), []).append(cell)
    for (kind, number), cells in prompts.items():
        if kind == "paraphrase":
            record.setdefault("paraphrases", []).extend(cells)
        else:
            answer = answers.get((kind, number), "")
            probes = [{"prompt": cell, "answer": answer} for cell in cells]
            record.setdefault(kind, []).extend(probes)
    return record
