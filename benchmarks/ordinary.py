"""Ordinary prompts that no edit is about, and how many of them an edit set fires on."""

import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.wilson import wilson_interval
from microedit_trainer.contexts import ContextName, Contexts, PromptTokens
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.facts import Fact
from microedit_vllm.errors import MicroEditError

PASSAGES, REQUESTS, CODE, QUESTIONS = 400, 250, 150, 200
VERBS = (
    *("Write a short paragraph about", "Give me five facts about", "Write a poem about"),
    *("What is the best way to learn about", "Explain to a beginner the basics of"),
    *("Plan a lesson about", "Why do people like", "Summarise the history of"),
    *("Suggest three books about", "Tell a child something surprising about"),
)
TOPICS = (
    *("music", "the ocean", "football", "Roman roads", "gardening", "quantum physics", "coffee"),
    *("bicycles", "taxes", "volcanoes", "chess", "birds", "Linux", "poetry", "bread", "railways"),
    *("dreams", "medicine", "painting", "maps", "cheese", "the desert", "spreadsheets", "winter"),
    *("sleep", "bridges", "tea", "stars"),
)
NQ_PREFIX = "nq question: "

Traffic = dict[str, list[PromptTokens]]


def ordinary_prompts(
    contexts: Contexts,
    text: Path,
    questions: Sequence[str] = (),
    edited: Sequence[Fact] = (),
    seed: int = 0,
) -> Traffic:
    """1,000 prompts by kind: passages of `text`, chat requests, Python code, NQ questions.

    Args:
        questions: Natural Questions as ZsRE has them, with its prefix; 800 prompts without them.
        edited: no prompt names a subject of these.

    Raises:
        MicroEditError: too few passages or questions that are not about an edited fact.
    """
    draw, about = random.Random(seed), mentions(edited)

    def sample(kind: str, pool: Iterable[str], count: int) -> list[str]:
        free = [one for one in dict.fromkeys(pool) if not about(one)]
        if len(free) < count:
            raise MicroEditError(
                f"{len(free)} of the {kind} are about no edited fact; {count} are needed"
            )
        return draw.sample(free, count)

    def rendered(context: ContextName, prompts: Iterable[str]) -> list[PromptTokens]:
        return [contexts.render(context, prompt) for prompt in prompts]

    lines = text.read_text(encoding="utf-8").split("\n")
    passages = [_beginning(line, draw.randint(15, 60)) for line in lines if len(line.split()) > 30]
    code = sample("pieces of code", _pieces_of_code(draw), CODE)
    half = CODE // 2
    traffic = {
        "encyclopaedia passages": rendered("bare", sample("passages", passages, PASSAGES)),
        "chat requests": rendered("chat", sample("requests", chat_requests(), REQUESTS)),
        "code": rendered("bare", code[:half]),
        "code, in chat": rendered("chat", (f"Explain this code:\n\n{c}" for c in code[half:])),
    }
    if not questions:
        return traffic
    asked = sample("questions", (q.removeprefix(NQ_PREFIX) for q in questions), QUESTIONS)
    names: tuple[ContextName, ...] = ("bare", "chat")
    for place, (context, prefix) in enumerate((c, p) for c in names for p in ("", NQ_PREFIX)):
        kind = f"NQ questions, {context}{', with their prefix' if prefix else ''}"
        traffic[kind] = rendered(context, (prefix + q for q in asked[place::4]))
    return traffic


def nq_questions(records: Iterable[Fact]) -> list[str]:
    """The locality prompts of ZsRE records, which are Natural Questions."""
    return [probe.prompt for record in records for probe in record.locality]


def chat_requests() -> list[str]:
    """What people ask a chat assistant for: all that there are, in a fixed order."""
    ends = {verb: "?" if verb.startswith(("What", "Why")) else "." for verb in VERBS}
    return [f"{verb} {topic}{end}" for verb, end in ends.items() for topic in TOPICS]


def count_fires(engine: TorchEngine, traffic: Traffic) -> dict[str, Any]:
    """How many ordinary prompts switch on, as JSON, with Wilson's 95% interval of the share."""
    ards = {kind: engine.ards(prompts) for kind, prompts in traffic.items()}
    fires = {kind: int(engine.operator.is_on(own).sum()) for kind, own in ards.items()}
    total, on = sum(map(len, ards.values())), sum(fires.values())
    return {
        "fires": on,
        "total": total,
        "interval": list(wilson_interval(on, total)),
        "smallest_ard": min(float(own.min()) for own in ards.values()),
        "kinds": {kind: [fires[kind], len(own)] for kind, own in ards.items()},
    }


def fires_in_words(found: dict[str, Any]) -> str:
    """`count_fires` on one line: "1 of 1000 (0.02% to 0.56%)"."""
    low, high = found["interval"]
    return f"{found['fires']} of {found['total']} ({low:.2%} to {high:.2%})"


def mentions(facts: Sequence[Fact]) -> Callable[[str], bool]:
    """Whether a text names the subject of a fact, letter case and punctuation aside."""
    subjects = {_words(fact.subject) for fact in facts if fact.subject} - {()}
    lengths = sorted({len(subject) for subject in subjects})

    def about(text: str) -> bool:
        words = _words(text)
        return any(words[i : i + n] in subjects for n in lengths for i in range(len(words)))

    return about


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _beginning(passage: str, words: int) -> str:
    return " ".join(passage.split()[:words])


def _pieces_of_code(draw: random.Random) -> list[str]:
    """Twelve lines of each module of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    patterns = ("*.py", "asyncio/*.py", "email/*.py")
    modules = [path for pattern in patterns for path in library.glob(pattern)]
    pieces = []
    for path in sorted(modules):
        lines = path.read_text(encoding="utf-8", errors="ignore").split("\n")
        start = draw.randrange(max(1, len(lines) - 12))
        pieces.append("\n".join(lines[start : start + 12]).strip() or "import os")
    return pieces
