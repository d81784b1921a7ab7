"""How much of its prompts an engine with edits finds in the prefix cache, against a plain one.

    python benchmarks/prefix_reuse.py --model demo/model --edits demo/edits --out prefix_reuse.json

The trace: conversations of several turns behind one system prompt, which all take their turns
together. A turn's prompt is everything so far: the system prompt, the earlier questions, the
engine's own answers to them. Some conversations ask edited facts, most do not. Between the turns
the same few prompts are sent again and again.

Both engines play the same trace, one after the other. What is counted: tokens of prompts that came
from the cache, over tokens of prompts.
"""

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.offline_engine import KINDS, Kind, OfflineEngine, Output
from benchmarks.ordinary import TOPICS, VERBS
from benchmarks.serving import vllm_version
from microedit_trainer.contexts import long_system_prompt
from microedit_vllm.artifact import EditSet
from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.errors import MicroEditError

REPEATED_FACTS, REPEATED_OTHERS = 1, 3
_WORDS = ("first-question", "first-answer", "second-question")


@dataclass(frozen=True)
class Conversation:
    """What is sent, turn by turn.

    Attributes:
        kind: "edited" where its questions are edited facts, "unedited", or "repeated" where the
            same prompt is sent each time.
        turns: tokens that each turn puts behind what was said before; the first holds the system
            prompt, the others end the answer before them.
    """

    kind: str
    turns: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sent:
    """One prompt, how much of it came from the cache, and the decision (None: plain)."""

    kind: str
    turn: int
    prompt_tokens: int
    cached: int
    on: bool | None


class ChatPieces:
    """The chat template, cut into what opens a conversation and what goes on with it."""

    def __init__(self, tokenizer: Any, system: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise MicroEditError("the model has no chat template; conversations need one")
        messages = [{"role": "system", "content": system}]
        roles = ("user", "assistant", "user")
        messages += [{"role": r, "content": w} for r, w in zip(roles, _WORDS, strict=True)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        self._tokenizer = tokenizer
        self._head, _, rest = text.partition(_WORDS[0])
        to_answer, _, rest = rest.partition(_WORDS[1])
        self._close, _, self._to_answer = rest.partition(_WORDS[2])
        if to_answer != self._to_answer:
            raise MicroEditError("the chat template opens the second answer in another way")

    def opening(self, question: str) -> tuple[int, ...]:
        """System prompt and first question, up to the answer."""
        return self._tokens(self._head + question + self._to_answer)

    def next_question(self, question: str) -> tuple[int, ...]:
        """The end of the answer and another question."""
        return self._tokens(self._close + question + self._to_answer)

    def conversation(self, kind: str, questions: Sequence[str]) -> Conversation:
        """One question a turn."""
        first, *others = questions
        turns = (self.opening(first), *(self.next_question(q) for q in others))
        return Conversation(kind, turns)

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)


def make_trace(
    chat: ChatPieces, facts: Sequence[str], conversations: int, edited: int, turns: int
) -> list[Conversation]:
    """`conversations` of which `edited` ask facts, and the prompts that are repeated each turn."""
    ordinary = [f"{verb} {topic}." for topic in TOPICS for verb in VERBS]
    trace = []
    for index in range(conversations):
        kind, pool = ("edited", facts) if index < edited else ("unedited", ordinary)
        questions = [pool[(index * turns + i) % len(pool)] for i in range(turns)]
        trace.append(chat.conversation(kind, questions))
    repeated = [*facts[-REPEATED_FACTS:], *ordinary[-REPEATED_OTHERS:]]
    trace += [Conversation("repeated", (chat.opening(prompt),) * turns) for prompt in repeated]
    return trace


def play(engine: OfflineEngine, trace: Sequence[Conversation], answer_tokens: int) -> list[Sent]:
    """Send the trace, all conversations' next turns in one batch each time.

    Answers all have `answer_tokens` tokens: where one would end sooner the model goes on.
    """
    said: list[tuple[int, ...]] = [()] * len(trace)
    sent = []
    for turn in range(max(len(conversation.turns) for conversation in trace)):
        going = [i for i, c in enumerate(trace) if turn < len(c.turns)]
        prompts = [
            trace[i].turns[turn] if trace[i].kind == "repeated" else said[i] + trace[i].turns[turn]
            for i in going
        ]
        batch = engine.generate(prompts, max_tokens=answer_tokens, min_tokens=answer_tokens)
        for i, prompt, output in zip(going, prompts, batch.outputs, strict=True):
            said[i] = prompt + output.tokens
            sent.append(_sent(trace[i].kind, turn, prompt, output))
    return sent


def _sent(kind: str, turn: int, prompt: Sequence[int], output: Output) -> Sent:
    on = None if output.decision is None else bool(output.decision["on"])
    return Sent(kind, turn, len(prompt), output.cached, on)


def hit_rates(sent: Sequence[Sent]) -> dict[str, dict[str, float]]:
    """By kind of conversation and for all: prompt tokens, those from the cache, and the rate."""
    groups = defaultdict(list)
    for one in sent:
        groups[one.kind].append(one)
    groups["all"] = list(sent)
    found = {}
    for kind, members in groups.items():
        prompt, cached = (sum(getattr(m, n) for m in members) for n in ("prompt_tokens", "cached"))
        switched = sum(bool(m.on) for m in members)
        found[kind] = {
            "requests": len(members),
            "switched_on": switched,
            "prompt_tokens": prompt,
            "cached": cached,
            "rate": cached / prompt,
        }
    return found


def engines(
    model: str, setting: dict[str, Any], folder: Path, arguments: dict[str, Any]
) -> Iterator[tuple[Kind, OfflineEngine]]:
    """One running engine after the other."""
    for kind in KINDS:
        edits = setting if kind == "microedit" else None
        with OfflineEngine(model, edits, folder / f"{kind}.log", **arguments) as engine:
            yield kind, engine


def show(console: Console, rates: dict[Kind, dict[str, dict[str, float]]]) -> None:
    """Print one row per kind of conversation."""
    table = Table(title="Prompt tokens from the prefix cache")
    for heading in ("conversations", "requests", "switched on", "prompt tokens", *KINDS):
        table.add_column(heading, justify="left" if heading == "conversations" else "right")
    for kind, ours in rates["microedit"].items():
        counts = (ours[name] for name in ("requests", "switched_on", "prompt_tokens"))
        shares = (f"{rates[side][kind]['rate']:.1%}" for side in KINDS)
        table.add_row(kind, *(str(count) for count in counts), *shares)
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help="What to serve: a folder or a hub id.")],
    edits: Annotated[Path, typer.Option(help="Folder of the edit set.")],
    sae: Annotated[Path | None, typer.Option(help="Folder of its SAE, if it has moved.")] = None,
    conversations: Annotated[int, typer.Option(min=1, help="Conversations in all.")] = 12,
    edited: Annotated[int, typer.Option(min=0, help="Of these, about edited facts.")] = 3,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 4,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 40,
    block_size: Annotated[
        int, typer.Option(help="Tokens of a KV block; on the CPU 32 at least, 128 by default.")
    ] = 32,
    max_model_len: Annotated[int, typer.Option(help="Longest conversation.")] = 2048,
    out: Annotated[Path, typer.Option(help="JSON result.")] = Path(
        "benchmarks/results/prefix_reuse.json"
    ),
) -> None:
    """Measure prefix-cache hits on a multi-turn trace, plain and with edits."""
    facts = [fact["prompt"] for fact in EditSet.load(edits).facts]
    chat = ChatPieces(AutoTokenizer.from_pretrained(model), long_system_prompt())
    trace = make_trace(chat, facts, conversations, edited, turns)
    arguments: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": max_model_len,
        "block_size": block_size,
    }
    setting = {"edit_set": str(edits), **({"sae": str(sae)} if sae else {})}
    sent: dict[Kind, list[Sent]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, engine in engines(model, setting, Path(folder), arguments):
            sent[kind] = play(engine, trace, answer_tokens)
    rates = {kind: hit_rates(those) for kind, those in sent.items()}
    report = {
        "model": model,
        "edits": str(edits),
        "engine": arguments,
        "conversations": conversations,
        "edited": edited,
        "turns": turns,
        "answer_tokens": answer_tokens,
        "vllm": vllm_version(),
        "rates": rates,
        "sent": {kind: [vars(one) for one in those] for kind, those in sent.items()},
    }
    write_atomically(out, (json.dumps(report, indent=2) + "\n").encode())
    console = Console()
    show(console, rates)
    console.print(f"written to {out}", highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MicroEditError as error:
        sys.exit(f"prefix_reuse: {error}")
