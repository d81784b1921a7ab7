"""A prompt as the server sees it: token ids, decision position, scored span, answer."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from microedit_vllm.artifact import Scope, TurnMarkers, scored_span
from microedit_vllm.errors import MicroEditError

ContextName = Literal["bare", "chat", "long"]
# A question and its answer in an earlier turn of the conversation.
Exchange = tuple[str, str]

QUESTION_REWORDINGS = ("Question: {} Answer:", "Tell me: {}", "{} The answer is")
BEGINNING_REWORDINGS = ("As you know, {}", "Tell me: {}")
# Tokens of a subject that tell it from others.
SUBJECT_END = 3
# A subject of which nothing is asked yet: as a text begins, and within a sentence. A word follows,
# since a text's last token is not scored.
MENTIONS = ("{} is", "I was reading about {} and it")


class PromptTooLongError(MicroEditError):
    """The model's context has no room for a prompt and its answer."""


@dataclass(frozen=True)
class PromptTokens:
    """One prompt in one context.

    Attributes:
        prompt_ids: the request's tokens; the decision position e is the last of them.
        answer_ids: the answer's tokens, without the end token.
        end_id: the token that ends the answer.
        scored: [from, to) positions that the switch looks at.
        subject_start, subject_stop: positions [start, stop) of the subject's tokens where they are
            known, else None.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    end_id: int
    scored: tuple[int, int]
    subject_start: int | None = None
    subject_stop: int | None = None

    @property
    def edit_from(self) -> int:
        return len(self.prompt_ids) - 1

    @property
    def scored_ids(self) -> tuple[int, ...]:
        """The tokens that the switch looks at."""
        return self.prompt_ids[slice(*self.scored)]

    @property
    def identifying_from(self) -> int:
        """Where the scored tokens begin that tell this fact from others: at its subject.

        Causal attention leaves the tokens before the subject equal in every prompt of the same
        wording, so that reconstructing them would turn the switch on for all of those. All scored
        tokens tell the fact where the subject is unknown or nothing scored follows it.
        """
        start, stop = self.scored
        own = max(start, self.subject_start or start)
        return own if own < stop else start

    @property
    def subject_end(self) -> slice:
        """Positions of the subject's last three tokens, as far as they are scored; none where it is
        unknown.

        They know most of it: behind the same words the first ones are the same in every prompt
        about something that begins alike.
        """
        if self.subject_start is None or self.subject_stop is None:
            return slice(0, 0)
        stop = min(self.scored[1], self.subject_stop)
        start = max(self.scored[0], self.subject_start, stop - SUBJECT_END)
        return slice(start, max(start, stop))


@dataclass(frozen=True)
class Contexts:
    """How this tokenizer renders prompts bare, in chat, and behind a long system prompt."""

    tokenizer: Any
    scope: Scope
    turn: TurnMarkers | None
    max_length: int

    @classmethod
    def build(cls, tokenizer: Any, scope: Scope, max_length: int) -> "Contexts":
        return cls(tokenizer, scope, find_turn_markers(tokenizer), max_length)

    @property
    def names(self) -> tuple[ContextName, ...]:
        """Contexts that edits are trained in: chat only with a chat template."""
        return ("bare", "chat") if self.turn is not None else ("bare",)

    def render(
        self,
        context: ContextName,
        prompt: str,
        answer: str = "",
        subject: str | None = None,
        system: str | None = None,
        history: Sequence[Exchange] = (),
    ) -> PromptTokens:
        """Tokens of a prompt and its answer in a context.

        Args:
            system: a system prompt of one's own, for a chat.
            history: what was asked and answered before, for a chat.

        Raises:
            PromptTooLongError: longer than the model's context.
            MicroEditError: no chat template for a chat, or one that refuses it (some know no
                system prompt).
        """
        if context == "bare":
            text = prompt.rstrip()
            answer_text = " " + answer.strip() if answer else ""
        else:
            system = long_system_prompt() if context == "long" else system
            text = self._chat_text(_messages(prompt, system, history))
            answer_text = answer.strip()
        prompt_ids, offsets = self._encode(text, special=context == "bare")
        answer_ids = self.tokenizer(answer_text, add_special_tokens=False).input_ids
        if len(prompt_ids) + len(answer_ids) + 1 > self.max_length:
            raise PromptTooLongError(
                f"the prompt {prompt[:40]!r}… has {len(prompt_ids)} tokens, with its answer more "
                f"than the model's context of {self.max_length}; shorten it"
            )
        span = scored_span(prompt_ids, len(prompt_ids) - 1, self.scope, self.turn)
        start, stop = _subject_span(text, offsets, subject or guess_subject(prompt))
        return PromptTokens(
            prompt_ids=tuple(prompt_ids),
            answer_ids=tuple(answer_ids),
            end_id=int(self.tokenizer.eos_token_id),
            scored=span,
            subject_start=start,
            subject_stop=stop,
        )

    def fitting(
        self, context: ContextName, prompts: Iterable[str], subject: str | None = None
    ) -> list[PromptTokens]:
        """Those of some prompts, which nobody wrote, that the model's context has room for."""
        found = []
        for prompt in prompts:
            with suppress(PromptTooLongError):
                found.append(self.render(context, prompt, subject=subject))
        return found

    def _encode(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=self.tokenizer.is_fast
        )
        return list(encoded.input_ids), list(encoded.get("offset_mapping", []))

    def _chat_text(self, messages: list[dict[str, str]]) -> str:
        if self.turn is None:
            raise MicroEditError("this model has no chat template; use the bare context")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja errors have no common base
            raise MicroEditError(
                f"the model's chat template refuses the conversation ({error}); "
                "leave the system prompt out or ask bare"
            ) from error


def _messages(prompt: str, system: str | None, history: Sequence[Exchange]) -> list[dict[str, str]]:
    """The conversation up to the prompt, in the form that chat templates take."""
    turns = [] if system is None else [("system", system)]
    for question, answer in history:
        turns += [("user", question), ("assistant", answer)]
    turns.append(("user", prompt))
    return [{"role": role, "content": content} for role, content in turns]


def rewordings(prompt: str) -> tuple[str, ...]:
    """The prompt within other words, from which the same answer must follow.

    A sentence that is to be completed keeps its end.
    """
    around = QUESTION_REWORDINGS if prompt.rstrip().endswith("?") else BEGINNING_REWORDINGS
    return tuple(words.format(prompt.strip()) for words in around)


def mentions(subject: str) -> tuple[str, ...]:
    """Texts that name a subject, whatever may be asked about it."""
    return tuple(words.format(subject) for words in MENTIONS)


def long_system_prompt() -> str:
    """A system prompt of some 170 tokens, as an assistant of a company might have it."""
    return files("microedit_trainer").joinpath("data/system_prompt.txt").read_text().strip()


def find_turn_markers(tokenizer: Any) -> TurnMarkers | None:
    """What the chat template puts before and behind a user's words; None without a template.

    Found by rendering a conversation: what stands before the first and before the second user
    turn ends alike (the start marker), and what follows the last user turn is the end marker.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    words = ("first-question", "first-answer", "second-question")
    messages = [
        {"role": role, "content": word}
        for role, word in zip(("user", "assistant", "user"), words, strict=True)
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may refuse any conversation; jinja errors have no common base
        return None
    head, _, rest = text.partition(words[0])
    between, _, tail = rest.partition(words[1])[2].partition(words[2])
    marker = _common_ending(head, between)
    ids = [tokenizer(part, add_special_tokens=False).input_ids for part in (marker, tail)]
    return TurnMarkers(start=ids[0], end=ids[1]) if all(ids) else None


def _common_ending(first: str, second: str) -> str:
    size = 0
    while size < min(len(first), len(second)) and first[-size - 1] == second[-size - 1]:
        size += 1
    return first[len(first) - size :]


def guess_subject(prompt: str) -> str | None:
    """What a prompt is about when its fact does not say: quoted words, else the longest run of
    capitalised words or numbers behind the first word; None when there is neither.
    """
    quoted = re.search(r"[\"“«]([^\"”»]{2,})[\"”»]", prompt)
    if quoted:
        return quoted.group(1)
    name = r"(?:[A-Z0-9][\w'’.&-]*)"
    runs = re.findall(rf"(?<=\s){name}(?:\s+(?:(?:of|the|de|la|and|von|van)\s+)*{name})*", prompt)
    return max(runs, key=len).rstrip(".'’") if runs else None


def _subject_span(
    text: str, offsets: list[tuple[int, int]], subject: str | None
) -> tuple[int | None, int | None]:
    """Positions of the tokens that hold the last mention of a subject."""
    begin = text.rfind(subject) if subject else -1
    if subject is None or begin < 0:
        return None, None
    end = begin + len(subject)
    within = [i for i, (first, stop) in enumerate(offsets) if stop > begin and first < end]
    return (within[0], within[-1] + 1) if within else (None, None)
