"""docs/quality.md: sections of text, a table and pictures; a section that was not built stays."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from microedit_vllm.artifact.atomic import write_atomically

HEAD = """
# Quality

Written by `make quality`; do not edit by hand. Scores are token accuracies under teacher forcing,
in the trainer's own engine: **Rel** on the edited prompts, **Gen** on their paraphrases, **Loc**
the share of tokens unchanged on the records' locality prompts, **near** the same on questions of
the same kind that were not edited, **own wording** the same on the edited prompts about another
subject. **on** is the share of prompts that switch on. No record that is scored is in the SAE's
text or calibrates τ.
"""


@dataclass(frozen=True)
class Section:
    """One table of the page.

    Attributes:
        name: what --only calls it.
        text: Markdown in front of the table, its lines broken anywhere.
        pictures: PNG by the end of its file's name.
    """

    name: str
    title: str
    text: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    def markdown(self, stem: str) -> str:
        """As it stands on the page, between its markers."""
        parts = [
            _begin(self.name),
            f"## {self.title}",
            paragraphs(self.text),
            markdown_table(self.header, self.lines),
            *(f"![{self.title}]({_picture_name(stem, end)})" for end in self.pictures),
            _end(self.name),
        ]
        return "\n\n".join(part for part in parts if part)


def write_page(
    page: Path, made_with: str, sections: Sequence[Section], order: Sequence[str]
) -> None:
    """Put sections on the page, in their order, beside those that are there already.

    Pictures first: a page never names one that is missing.

    Args:
        made_with: a line about model and machine.
        order: names of all sections that the page may have.
    """
    there = _sections(page.read_text(encoding="utf-8")) if page.exists() else {}
    for section in sections:
        for end, image in section.pictures.items():
            write_atomically(page.with_name(_picture_name(page.stem, end)), image)
        there[section.name] = section.markdown(page.stem)
    parts = [paragraphs(HEAD), made_with, *(there[name] for name in order if name in there)]
    write_atomically(page, ("\n\n".join(parts) + "\n").encode())


def paragraphs(text: str) -> str:
    """Each paragraph on one line."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; a | in a cell is escaped."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(_cell(c) for c in row) + " |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _begin(name: str) -> str:
    return f"<!-- begin {name} -->"


def _end(name: str) -> str:
    return f"<!-- end {name} -->"


def _picture_name(stem: str, end: str) -> str:
    return f"{stem}_{end}.png"


def _sections(text: str) -> dict[str, str]:
    found = re.findall(r"(<!-- begin (\w+) -->.*?<!-- end \2 -->)", text, flags=re.DOTALL)
    return {name: whole for whole, name in found}
