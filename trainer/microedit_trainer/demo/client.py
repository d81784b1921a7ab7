"""The demo's side of the wire: the `openai` client against a `vllm serve` process."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from microedit_trainer.demo.prompts import SYSTEM_PROMPT, Question
from microedit_trainer.server_engine import ServerEngine

ANSWER_TOKENS = 16
CONCURRENCY = 16


@dataclass(frozen=True)
class Answer:
    """What a server said, and its switch where it has one."""

    text: str
    ard: float | None = None
    tau: float | None = None
    on: bool | None = None


def ask_all(server: ServerEngine, questions: Sequence[Question], edited: bool) -> list[Answer]:
    """Ask every question, greedily.

    Near and unrelated prompts go one after another, so that both servers run the very same
    schedule and their texts can be compared to the letter.

    Args:
        edited: whether the server has an edit set, whose decisions are read back.
    """

    def ask(question: Question) -> Answer:
        return _ask(server, question, edited)

    compared = [q.kind in ("near", "unrelated") for q in questions]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        together = pool.map(ask, [q for q, c in zip(questions, compared, strict=True) if not c])
        answers = iter(list(together))
    alone = iter([ask(q) for q, c in zip(questions, compared, strict=True) if c])
    return [next(alone) if c else next(answers) for c in compared]


def _ask(server: ServerEngine, question: Question, edited: bool) -> Answer:
    if question.kind == "chat":
        request_id, text = _chat(server, question.prompt)
    else:
        completion: Any = server.client.completions.create(
            model=server.model, prompt=question.prompt, max_tokens=ANSWER_TOKENS, temperature=0
        )
        request_id, text = completion.id, completion.choices[0].text
    if not edited:
        return Answer(text)
    decision = server.decision(request_id)
    return Answer(text, decision["ard"], decision["tau"], decision["on"])


def _chat(server: ServerEngine, prompt: str) -> tuple[str, str]:
    completion: Any = server.client.chat.completions.create(
        model=server.model,
        messages=[
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": prompt},
        ],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
    )
    return completion.id, completion.choices[0].message.content or ""


def tokens_per_second(server: ServerEngine, prompts: Sequence[str], tokens: int = 48) -> float:
    """Generated tokens per second, all prompts at once, each to the same length."""

    def generate(prompt: str) -> int:
        completion: Any = server.client.completions.create(
            model=server.model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return int(completion.usage.completion_tokens)

    started = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool:
        total = sum(pool.map(generate, prompts))
    return total / (time.monotonic() - started)
