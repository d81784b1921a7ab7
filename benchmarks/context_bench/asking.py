"""Every way of asking that is measured: edited facts, and questions that no edit is about."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from benchmarks.context_bench import wording
from benchmarks.context_bench.conversation import EXCHANGES, system_prompts
from benchmarks.ordinary import NQ_PREFIX, chat_requests, mentions
from microedit_trainer.contexts import ContextName, Contexts, Exchange, PromptTokens
from microedit_trainer.facts import Fact, prompt_digest, read_facts
from microedit_vllm.errors import MicroEditError

SYSTEM_TOKENS = (0, 50, 170, 500, 1000)
LANGUAGES = {"de": "German", "fr": "French"}
# About another subject, in the wording of an edited fact or nearly so.
LIKE_QUESTION = "a question of the facts' kind"


@dataclass(frozen=True)
class Case:
    """Prompts that are asked in one way.

    Attributes:
        edited: whether they are about edited facts, so that the switch should be on.
    """

    name: str
    context: ContextName
    prompts: tuple[PromptTokens, ...]
    edited: bool = True


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        facts: the edited ones.
        others: records of the same kind that were neither edited nor calibrated on.
        passages: text for system prompts.
        translated: by language, pairs of an edited fact and its record in that language.
    """

    facts: Sequence[Fact]
    others: Sequence[Fact]
    passages: Sequence[str]
    translated: Mapping[str, Sequence[tuple[Fact, Fact]]] = field(default_factory=dict)


def translations(path: Path, language: str, facts: Sequence[Fact]) -> list[tuple[Fact, Fact]]:
    """The facts that a MzsRE file has, each with its record in another language."""
    edited = {prompt_digest(fact.prompt): fact for fact in facts}
    english, foreign = read_facts(path, language="en"), read_facts(path, language=language)
    pairs = [
        (edited[digest], there)
        for here, there in zip(english, foreign, strict=True)
        if (digest := prompt_digest(here.prompt)) in edited
    ]
    if not pairs:
        raise MicroEditError(f"no record of {path} is about an edited fact; name another file")
    return pairs


def cases(contexts: Contexts, questions: Questions) -> Iterator[Case]:
    """All of them, those in chat only with a chat template."""
    for name in contexts.names:
        yield from _reworded(contexts, name, questions.facts)
        for language, pairs in questions.translated.items():
            yield from _translated(contexts, name, LANGUAGES.get(language, language), pairs)
    if contexts.turn is not None:
        yield from _behind_system_prompts(contexts, questions)
        yield from _second_turns(contexts, questions.facts)
        yield from _unedited_second_turns(contexts, questions)


def _reworded(contexts: Contexts, context: ContextName, facts: Sequence[Fact]) -> Iterator[Case]:
    def case(name: str, reword: Callable[[int, Fact], str | None]) -> Case:
        worded = [(reword(place, fact), fact) for place, fact in enumerate(facts)]
        prompts = [contexts.render(context, w, f.target, f.subject) for w, f in worded if w]
        return Case(name, context, tuple(prompts))

    def typos(inside: bool, count: int) -> Callable[[int, Fact], str | None]:
        return lambda place, f: wording.typos(f.prompt, f.subject or "", inside, count, place)

    yield case("as edited", lambda _, f: f.prompt)
    yield case("ends a longer message", lambda i, f: wording.longer(f.prompt, False, i))
    yield case("amid a longer message", lambda i, f: wording.longer(f.prompt, True, i))
    yield case("lower case", lambda _, f: wording.in_lower_case(f.prompt))
    yield case("no question mark", lambda _, f: wording.without_question_mark(f.prompt))
    for inside, where in ((False, "outside"), (True, "inside")):
        for count, number in ((1, "one typo"), (2, "two typos")):
            yield case(f"{number} {where} the subject", typos(inside, count))


def _translated(
    contexts: Contexts, context: ContextName, language: str, pairs: Sequence[tuple[Fact, Fact]]
) -> Iterator[Case]:
    for answers, side in ((language, 1), ("English", 0)):
        prompts = [contexts.render(context, p[1].prompt, p[side].target) for p in pairs]
        yield Case(f"in {language}, answered in {answers}", context, tuple(prompts))


def _behind_system_prompts(contexts: Contexts, questions: Questions) -> Iterator[Case]:
    facts, tokenizer = questions.facts, contexts.tokenizer
    for size in SYSTEM_TOKENS:
        systems = system_prompts(tokenizer, questions.passages, size, len(facts))
        prompts = [
            contexts.render("chat", fact.prompt, fact.target, fact.subject, system=system)
            for fact, system in zip(facts, systems, strict=True)
        ]
        yield Case(f"behind a system prompt of {size} tokens", "chat", tuple(prompts))


def _second_turns(contexts: Contexts, facts: Sequence[Fact]) -> Iterator[Case]:
    def case(name: str, earlier: Callable[[int, Fact], Exchange | None]) -> Case:
        asked = [(fact, earlier(place, fact)) for place, fact in enumerate(facts)]
        prompts = [
            contexts.render("chat", fact.prompt, fact.target, fact.subject, history=[exchange])
            for fact, exchange in asked
            if exchange
        ]
        return Case(name, "chat", tuple(prompts))

    def another(place: int, fact: Fact) -> Exchange | None:
        others = (*facts[place + 1 :], *facts[:place])
        found = next((other for other in others if other.subject != fact.subject), None)
        return _asked(found) if found else None

    yield case("second turn, after an ordinary one", lambda i, _: EXCHANGES[i % len(EXCHANGES)])
    yield case("second turn, after another edited fact", another)


def _unedited_second_turns(contexts: Contexts, questions: Questions) -> Iterator[Case]:
    """An edited question and its new answer, then something else."""
    facts, about = questions.facts, mentions(questions.facts)
    free = [other for other in questions.others if not about(other.prompt)]
    probes = [probe for other in free for probe in other.locality if not about(probe.prompt)]
    asked: dict[str, list[Exchange]] = {
        "an NQ question": [(p.prompt.removeprefix(NQ_PREFIX), p.answer) for p in probes],
        "a chat request": [(r, "") for r in chat_requests() if not about(r)],
        LIKE_QUESTION: [(other.prompt, other.target) for other in free],
    }
    for name, own in asked.items():
        prompts = [
            # Without an answer the next token alone is compared.
            contexts.render("chat", prompt, answer.strip() or "the", history=[_asked(fact)])
            for (prompt, answer), fact in zip(own, cycle(facts), strict=False)
        ]
        yield Case(f"{name} after an edited turn", "chat", tuple(prompts), edited=False)


def _asked(fact: Fact) -> Exchange:
    return fact.prompt, fact.target
