"""Facts files: what to edit, and what to measure it with.

Recognised as they are: this project's JSON Lines (`prompt`, `target`, optional `paraphrases`,
`locality`, `subject`), ZsRE in the MEND/WISE split (`src`, `alt`, `rephrase`, `loc`, `loc_ans`),
CounterFact and SelfCheckGPT (`prompt`, `target_new`, `rephrase_prompt`, `locality_prompt`,
`locality_ground_truth`); each as JSON Lines or as one JSON array.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer should stay what it was, with the tokens it is scored over."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """One edit: after `prompt` the model shall answer `target`."""

    prompt: str
    target: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()


def read_facts(path: Path, limit: int | None = None) -> list[Fact]:
    """The facts of a file, at most `limit`.

    Raises:
        MicroEditError: missing, not JSON (with the line's number), an unknown record, an empty
            prompt or target, or no fact at all.
    """
    facts = []
    for where, record in _records(path):
        facts.append(_fact(record, where))
        if limit is not None and len(facts) == limit:
            break
    if not facts:
        raise MicroEditError(f"{path} holds no facts; write one JSON object a line")
    return facts


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MicroEditError(f"facts file {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MicroEditError(f"facts file {path} cannot be read as UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        yield from _array_records(path, text)
        return
    # Not splitlines(): a fact may hold U+2028 and the like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MicroEditError(f"{where}: not JSON ({error}); write one object a line") from error
        yield where, _object(record, where)


def _array_records(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MicroEditError(f"{path}: not JSON ({error})") from error
    for number, record in enumerate(array, start=1):
        where = f"{path}, record {number}"
        yield where, _object(record, where)


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise MicroEditError(f"{where}: expected a JSON object with prompt and target")
    return record


def _fact(record: dict[str, Any], where: str) -> Fact:
    if "src" in record and "alt" in record:
        fact = _zsre(record, where)
    elif "prompt" in record and "target_new" in record:
        fact = _counterfact(record, where)
    elif "prompt" in record and "target" in record:
        fact = _own(record, where)
    else:
        raise MicroEditError(f"{where}: needs the fields 'prompt' and 'target'")
    texts = [("prompt", fact.prompt), ("target", fact.target)]
    texts += [("paraphrase", paraphrase) for paraphrase in fact.paraphrases]
    texts += [("locality prompt", probe.prompt) for probe in fact.locality]
    for name, text in texts:
        if not text.strip():
            raise MicroEditError(f"{where}: the {name} is empty; fill it in or drop the line")
    return fact


def _text(record: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise MicroEditError(f"{where}: {key!r} must be a string")
    _check_encodable(value, where)
    return value


def _check_encodable(text: str, where: str) -> None:
    """JSON can spell half a character (\\ud800), which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MicroEditError(f"{where}: text that is not valid Unicode ({error.reason})") from error


def _subject(record: dict[str, Any], where: str) -> str | None:
    return None if record.get("subject") is None else _text(record, "subject", where)


def _zsre(record: dict[str, Any], where: str) -> Fact:
    locality: tuple[Probe, ...] = ()
    if record.get("loc"):
        locality = (Probe(_text(record, "loc", where), _text(record, "loc_ans", where)),)
    return Fact(
        prompt=_text(record, "src", where),
        target=_text(record, "alt", where),
        subject=_subject(record, where),
        paraphrases=(_text(record, "rephrase", where),) if record.get("rephrase") else (),
        locality=locality,
    )


def _counterfact(record: dict[str, Any], where: str) -> Fact:
    locality: tuple[Probe, ...] = ()
    if record.get("locality_prompt"):
        locality = (
            Probe(
                _text(record, "locality_prompt", where),
                _text(record, "locality_ground_truth", where),
            ),
        )
    rephrase = record.get("rephrase_prompt")
    return Fact(
        prompt=_text(record, "prompt", where),
        target=_text(record, "target_new", where),
        subject=_subject(record, where),
        paraphrases=(_text(record, "rephrase_prompt", where),) if rephrase else (),
        locality=locality,
    )


def _own(record: dict[str, Any], where: str) -> Fact:
    paraphrases = record.get("paraphrases", [])
    if not isinstance(paraphrases, list) or not all(isinstance(p, str) for p in paraphrases):
        raise MicroEditError(f"{where}: 'paraphrases' must be a list of strings")
    for paraphrase in paraphrases:
        _check_encodable(paraphrase, where)
    locality = record.get("locality", [])
    if not isinstance(locality, list):
        raise MicroEditError(f"{where}: 'locality' must be a list of prompts")
    return Fact(
        prompt=_text(record, "prompt", where),
        target=_text(record, "target", where),
        subject=_subject(record, where),
        paraphrases=tuple(paraphrases),
        locality=tuple(_probe(item, where) for item in locality),
    )


def _probe(item: Any, where: str) -> Probe:
    if isinstance(item, str):
        item = {"prompt": item}
    record = _object(item, where)
    return Probe(_text(record, "prompt", where), _text(record, "answer", where, ""))


def find_conflicts(facts: Sequence[Fact]) -> dict[int, list[str]]:
    """Facts that contradict another one or repeat its prompt: index → notes for a person.

    Two facts with the same prompt and different targets cannot both hold; with the same target
    the second is superfluous.
    """
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        by_prompt[" ".join(fact.prompt.casefold().split())].append(index)
    notes: dict[int, list[str]] = defaultdict(list)
    for group in by_prompt.values():
        targets = {facts[i].target.strip().casefold() for i in group}
        for index in group if len(group) > 1 else ():
            others = ", ".join(str(other + 1) for other in group if other != index)
            kind = "contradicts" if len(targets) > 1 else "repeats"
            notes[index].append(f"{kind} fact {others}")
    return dict(notes)


def swap_subjects(facts: Sequence[Fact], subjects: Sequence[str]) -> list[str]:
    """The facts' own prompts about something that was not edited: what must not switch on.

    Args:
        subjects: what to ask about instead, taken in turn.

    Returns:
        one prompt for each fact that names a subject occurring in its prompt.
    """
    known = {fact.subject.casefold() for fact in facts if fact.subject}
    free = [s for s in subjects if s.casefold() not in known]
    named = [(f.prompt, f.subject) for f in facts if f.subject and f.subject in f.prompt]
    if not free:
        return []
    return [
        prompt.replace(subject, free[index % len(free)])
        for index, (prompt, subject) in enumerate(named)
    ]
