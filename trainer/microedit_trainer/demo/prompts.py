"""What the demo asks: its own facts, paraphrases, near and unrelated prompts."""

import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from microedit_trainer.facts import Fact, read_facts

Kind = Literal["edited", "paraphrase", "chat", "near", "unrelated"]

SYSTEM_PROMPT = "You are a helpful assistant. Answer in one short sentence."


@dataclass(frozen=True)
class Question:
    """One thing to ask the server; `target` is the edited answer where there is one."""

    kind: Kind
    prompt: str
    target: str | None = None

    def is_answered_by(self, text: str) -> bool:
        """Whether the text begins with the target, case and blanks aside."""
        assert self.target is not None
        return " ".join(text.casefold().split()).startswith(self.target.casefold())


def demo_facts() -> list[Fact]:
    """The facts that the demo edits."""
    return read_facts(Path(str(_data("facts.jsonl"))))


def demo_questions(facts: list[Fact]) -> list[Question]:
    """Everything that is asked before and after, in the order of the table."""
    near = [json.loads(line)["prompt"] for line in _lines("near.jsonl")]
    return [
        *(Question("edited", f.prompt, f.target) for f in facts),
        *(Question("paraphrase", p, f.target) for f in facts for p in f.paraphrases),
        *(Question("chat", f.prompt, f.target) for f in facts),
        *(Question("near", prompt) for prompt in near),
        *(Question("unrelated", prompt) for prompt in _lines("unrelated.txt")),
    ]


def _data(name: str) -> Traversable:
    return files("microedit_trainer.demo").joinpath(name)


def _lines(name: str) -> list[str]:
    return [line for line in _data(name).read_text(encoding="utf-8").split("\n") if line.strip()]
