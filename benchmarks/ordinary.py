"""Ordinary prompts that no edit is about: passages, general chat, code."""

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from microedit_trainer.contexts import Contexts, PromptTokens

VERBS = (
    "Write a short paragraph about",
    "Give me five facts about",
    "What is the best way to learn about",
    "Explain to a beginner the basics of",
    "Write a poem about",
    "Plan a lesson about",
    "Why do people like",
    "Summarise the history of",
)
TOPICS = (
    *("music", "the ocean", "football", "Roman roads", "gardening", "quantum physics", "coffee"),
    *("bicycles", "taxes", "volcanoes", "chess", "birds", "Linux", "poetry", "bread", "railways"),
    *("dreams", "medicine", "painting", "maps", "cheese", "the desert", "spreadsheets", "winter"),
)


def ordinary_prompts(contexts: Contexts, text: Path, seed: int = 0) -> list[PromptTokens]:
    """500 prompts: 250 passages of `text`, 150 chat requests, 100 pieces of Python code."""
    draw = random.Random(seed)
    lines = text.read_text(encoding="utf-8").split("\n")
    passages = draw.sample([line.strip() for line in lines if len(line.split()) > 30], 250)
    requests = draw.sample([f"{verb} {topic}." for verb in VERBS for topic in TOPICS], 150)
    bare = [_beginning(p, draw.randint(15, 60)) for p in passages] + _code(draw, 100)
    return [contexts.render("bare", p) for p in bare] + [
        contexts.render("chat", r) for r in requests
    ]


def _beginning(passage: str, words: int) -> str:
    return " ".join(passage.split()[:words])


def _code(draw: random.Random, count: int) -> Sequence[str]:
    """Pieces of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    pieces = []
    for path in draw.sample(files, count):
        lines = path.read_text(encoding="utf-8", errors="ignore").split("\n")
        start = draw.randrange(max(1, len(lines) - 12))
        pieces.append("\n".join(lines[start : start + 12]).strip() or "import os")
    return pieces
