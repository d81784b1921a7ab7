"""Records as they are published, each turned into a fact; a record's fields tell its layout.

| layout | fields | source |
|---|---|---|
| this project's | prompt, target, paraphrases, locality, portability | README |
| ZsRE, the MEND/WISE split | src, alt, rephrase, loc, loc_ans, portability | EasyEdit |
| MzsRE and its kin | a ZsRE record a language: {"en": {…}, "de": {…}} | ReMaKE, BMIKE-53 |
| CounterFact, SelfCheckGPT | prompt, target_new, rephrase_prompt, locality_prompt | WISE |
| CounterFact, the original | requested_rewrite, paraphrase_prompts, neighborhood_prompts | ROME |
| KnowEdit | prompt, target_new, rephrase, locality and portability as groups | EasyEdit |
| KnowEdit's WikiBio | text, labels, concept, locality as groups | EasyEdit |
"""

from collections.abc import Mapping
from typing import Any

from microedit_trainer.facts.fact import Fact, Probe
from microedit_vllm.errors import MicroEditError

# Fields by which a record without nested ones is known; each is needed.
NEEDED = (("prompt", "target"), ("src", "alt"), ("prompt", "target_new"), ("text", "labels"))
LAYOUTS = (
    "'prompt' and 'target'; ZsRE's 'src' and 'alt'; 'prompt' and 'target_new' as CounterFact, "
    "SelfCheckGPT and KnowEdit have them; CounterFact's 'requested_rewrite'; WikiBio's 'text' and "
    "'labels'; or MzsRE's ZsRE record for each language"
)


def read_record(record: dict[str, Any], where: str, language: str | None = None) -> Fact:
    """One record of any layout as a fact.

    Args:
        where: file and line, for messages.
        language: see `read_facts`.

    Raises:
        MicroEditError: an unknown layout, a field of another type, an empty text.
    """
    languages = _languages(record)
    if languages:
        record = _in_language(languages, language, where)
    fact = _fact(record, where)
    texts = [("prompt", fact.prompt), ("target", fact.target)]
    texts += [("paraphrase", paraphrase) for paraphrase in fact.paraphrases]
    texts += [("locality prompt", probe.prompt) for probe in fact.locality]
    for probe in fact.portability:
        texts += [("portability prompt", probe.prompt), ("portability answer", probe.answer)]
    for name, text in texts:
        if not text.strip():
            raise MicroEditError(f"{where}: the {name} is empty; fill it in or drop the line")
    return fact


def is_known(record: Mapping[str, Any]) -> bool:
    """Whether the names of these flat fields are those of a known layout."""
    return any(first in record and second in record for first, second in NEEDED)


def _fact(record: dict[str, Any], where: str) -> Fact:
    if "src" in record and "alt" in record:
        return _zsre(record, where)
    if "requested_rewrite" in record:
        return _rome_counterfact(record, where)
    if "prompt" in record and "target_new" in record:
        return _easyedit(record, where)
    if "prompt" in record and "target" in record:
        return _own(record, where)
    if "text" in record and "labels" in record:
        return _easyedit(record, where, "text", "labels", "concept")
    found = ", ".join(repr(name) for name in list(record)[:6]) or "none"
    raise MicroEditError(f"{where}: needs the fields {LAYOUTS}; it has {found}")


def _languages(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: side
        for name, side in record.items()
        if isinstance(side, dict) and "src" in side and "alt" in side
    }


def _in_language(
    languages: dict[str, dict[str, Any]], language: str | None, where: str
) -> dict[str, Any]:
    if language is None:
        return languages.get("en") or next(iter(languages.values()))
    if language not in languages:
        known = ", ".join(languages)
        raise MicroEditError(f"{where}: no language {language!r}; the record has {known}")
    return languages[language]


def _own(record: dict[str, Any], where: str) -> Fact:
    return Fact(
        prompt=_text(record, "prompt", where),
        target=_text(record, "target", where),
        subject=_subject(record, where),
        paraphrases=_texts(record, "paraphrases", where),
        locality=tuple(_probe(i, where) for i in _list(record, "locality", where)),
        portability=tuple(_probe(i, where) for i in _list(record, "portability", where)),
    )


def _zsre(record: dict[str, Any], where: str) -> Fact:
    hop = record.get("portability")
    portability: tuple[Probe, ...] = ()
    if isinstance(hop, dict) and hop.get("New Answer"):
        portability = _pair(hop, "New Question", "New Answer", where)
    return Fact(
        prompt=_text(record, "src", where),
        target=_text(record, "alt", where),
        subject=_subject(record, where),
        paraphrases=(_text(record, "rephrase", where),) if record.get("rephrase") else (),
        locality=_pair(record, "loc", "loc_ans", where),
        portability=portability,
    )


def _easyedit(
    record: dict[str, Any],
    where: str,
    prompt: str = "prompt",
    target: str = "target_new",
    subject: str = "subject",
) -> Fact:
    """CounterFact and SelfCheckGPT have one locality prompt, KnowEdit has groups of them."""
    rephrase = "rephrase_prompt" if record.get("rephrase_prompt") else "rephrase"
    wording = record.get(rephrase)
    several = not wording or isinstance(wording, list)
    flat = _pair(record, "locality_prompt", "locality_ground_truth", where)
    return Fact(
        prompt=_text(record, prompt, where),
        target=_text(record, target, where),
        subject=_subject(record, where, subject),
        paraphrases=_texts(record, rephrase, where)
        if several
        else (_text(record, rephrase, where),),
        locality=flat or _groups(record, "locality", where),
        portability=_groups(record, "portability", where),
    )


def _rome_counterfact(record: dict[str, Any], where: str) -> Fact:
    rewrite = _object(record["requested_rewrite"], where)
    subject = _text(rewrite, "subject", where)
    true = _object(rewrite.get("target_true", {}), where)
    unchanged = _text(true, "str", where, "")
    return Fact(
        prompt=_text(rewrite, "prompt", where).replace("{}", subject),
        target=_text(_object(rewrite.get("target_new"), where), "str", where),
        subject=subject,
        paraphrases=_texts(record, "paraphrase_prompts", where),
        locality=tuple(Probe(p, unchanged) for p in _texts(record, "neighborhood_prompts", where)),
    )


def _pair(record: dict[str, Any], prompt: str, answer: str, where: str) -> tuple[Probe, ...]:
    if not record.get(prompt):
        return ()
    return (Probe(_text(record, prompt, where), _text(record, answer, where)),)


def _groups(record: dict[str, Any], key: str, where: str) -> tuple[Probe, ...]:
    """KnowEdit's probes: {"Reasoning": [{"prompt", "ground_truth"}, …], …}, one after another.

    A ground truth may list several answers, each with its aliases. Like EasyEdit's runner, the
    first one counts, and a probe without any is left out.
    """
    probes = []
    for group in _object(record.get(key) or {}, where).values():
        for item in group if isinstance(group, list) else [group] if group else []:
            probe = _object(item, where)
            answer = _first(probe.get("ground_truth"))
            if answer is None or answer == "":
                continue
            first = {"prompt": _first(probe.get("prompt")), "ground_truth": answer}
            probes.append(Probe(_text(first, "prompt", where), _text(first, "ground_truth", where)))
    return tuple(probes)


def _first(value: Any) -> Any:
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def _probe(item: Any, where: str) -> Probe:
    if isinstance(item, str):
        item = {"prompt": item}
    record = _object(item, where)
    return Probe(_text(record, "prompt", where), _text(record, "answer", where, ""))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MicroEditError(f"{where}: expected a JSON object where {_shown(value)} stands")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _list(record: dict[str, Any], key: str, where: str) -> list[Any]:
    value = record.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise MicroEditError(f"{where}: {key!r} must be a list of prompts")
    return value


def _texts(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = record.get(key) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise MicroEditError(f"{where}: {key!r} must be a list of strings")
    for text in value:
        _check_encodable(text, where)
    return tuple(value)


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


def _subject(record: dict[str, Any], where: str, key: str = "subject") -> str | None:
    return None if record.get(key) is None else _text(record, key, where)
