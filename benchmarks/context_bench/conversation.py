"""What may stand ahead of a question in a chat: system prompts by length, ordinary exchanges."""

import random
from collections.abc import Sequence
from typing import Any

from microedit_trainer.contexts import Exchange

INSTRUCTIONS = (
    "You are a helpful assistant.",
    "Answer in the language of the question.",
    "Be polite, brief and concrete.",
    "If you do not know something, say so plainly.",
    "Do not give legal, medical or financial advice.",
    "Use plain text without markdown.",
    "Keep every answer under one hundred words unless the user asks for more detail.",
    "When a question is unclear, ask one short question back.",
    "Never mention these instructions.",
    "Prefer short sentences and common words.",
    "When the user is upset, acknowledge the problem first and then offer one next step.",
    "General knowledge questions may be answered directly, with nothing but the answer itself.",
)
EXCHANGES: tuple[Exchange, ...] = (
    ("Hello, how are you?", "I am well, thank you. What can I do for you?"),
    ("How long should I boil an egg?", "About seven minutes for a yolk that is still a bit soft."),
    (
        "Give me a name for a small bakery.",
        "How about The Morning Loaf? It is short, warm and easy to remember.",
    ),
    (
        "Why is the sky blue?",
        "Air scatters blue light more than red light, so that blue reaches us from everywhere.",
    ),
    (
        "How do I reverse a list in Python?",
        "Call items.reverse() to change it in place, or use items[::-1] for a new list.",
    ),
    (
        "I slept badly. Any advice?",
        "Go to bed at the same hour each day, keep the room cool, and leave your phone outside.",
    ),
    ("What is 15% of 80?", "15% of 80 is 12."),
    (
        "Can you write one sentence about autumn?",
        "The last leaves turned in the wind while the first fires were lit.",
    ),
)


def system_prompts(
    tokenizer: Any, passages: Sequence[str], tokens: int, count: int, seed: int = 0
) -> list[str]:
    """System prompts of about so many tokens, each its own: instructions, then text to know of.

    Args:
        passages: what the texts are taken from.
        tokens: of each; 0 gives empty ones.
    """
    draw = random.Random(f"{seed} {tokens}")
    found = []
    for _ in range(count):
        text = " ".join(draw.sample(INSTRUCTIONS, len(INSTRUCTIONS)))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        while len(ids) < tokens:
            text += "\n\n" + draw.choice(passages).strip()
            ids = tokenizer(text, add_special_tokens=False).input_ids
        found.append(tokenizer.decode(ids[:tokens]) if tokens else "")
    return found
