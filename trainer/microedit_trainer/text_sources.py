"""Texts to collect activations from: files, folders, fact files, installed packages.

A source is named on the command line: a path, `package:NAME`, or `questions`. Prose is cut into
passages; a record of a JSON Lines file gives each of its prompts with its answer, bare and, where
the tokenizer has a chat template, as a user's and an assistant's turn; so does each of the facts
about invented things that come with the trainer, `questions`.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from microedit_trainer.invented_facts import invented_facts
from microedit_vllm.errors import MicroEditError

PACKAGE = "package:"
QUESTIONS = "questions"
PROSE = (".txt", ".md", ".rst")
RECORDS = (".jsonl",)
PASSAGE_CHARACTERS = 1024

# (prompt field, answer field) in our own facts format and in those of ZsRE, CounterFact,
# SelfCheckGPT and the usual instruction sets; an answer of None stands for a prompt alone.
PROMPT_FIELDS = (
    ("prompt", "target"),
    ("prompt", "target_new"),
    ("paraphrases", "target"),
    ("locality", None),
    ("src", "alt"),
    ("rephrase", "alt"),
    ("loc", "loc_ans"),
    ("rephrase_prompt", "target_new"),
    ("locality_prompt", "locality_ground_truth"),
    ("question", "answer"),
    ("instruction", "output"),
)


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        source: what the SAE's report calls its origin.
        group: texts of one group (a record's prompts, bare and in chat) are held out together.
        is_chat: rendered through the chat template, which brings its special tokens.
    """

    source: str
    group: int
    content: str
    is_chat: bool = False


def read_texts(spec: str, tokenizer: Any, seed: int, max_characters: int) -> list[Text]:
    """The texts of one source in a seeded random order of groups.

    Args:
        max_characters: files of a folder or package beyond about this much are not read.

    Raises:
        MicroEditError: missing, unreadable, or without text.
    """
    if spec == QUESTIONS:
        return _invented_texts(tokenizer, seed, max_characters)
    rng = random.Random(f"{seed} {spec}")
    files = _files_of(spec)
    rng.shuffle(files)
    groups: list[list[Text]] = []
    characters = 0
    for path in files:
        if characters >= max_characters:
            break
        if path.suffix in RECORDS:
            found = [_record_texts(record, path.name, tokenizer) for record in read_records(path)]
        else:
            found = [[Text(_source_name(spec), 0, p)] for p in passages(_read(path))]
        groups += [group for group in found if group]
        characters += sum(len(text.content) for group in found for text in group)
    if not groups:
        raise MicroEditError(f"{spec} holds no text; name text files, a folder or JSON Lines")
    rng.shuffle(groups)
    return [
        Text(text.source, number, text.content, text.is_chat)
        for number, group in enumerate(groups)
        for text in group
    ]


def passages(text: str) -> Iterator[str]:
    """Stretches of at most `PASSAGE_CHARACTERS`, cut at white space where there is some."""
    start = 0
    while start < len(text):
        end = min(start + PASSAGE_CHARACTERS, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = space if space > start else end
        if passage := text[start:end].strip():
            yield passage
        start = end


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        MicroEditError: a line that is not a JSON object, with its number.
    """
    records = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MicroEditError(f"{path}, line {number} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise MicroEditError(f"{path}, line {number} is not a JSON object")
        records.append(record)
    return records


def render_turns(tokenizer: Any, prompt: str, answer: str) -> str:
    """The prompt as a user's turn and the answer as the assistant's, special tokens as text."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def turn_texts(source: str, prompt: str, answer: str, tokenizer: Any) -> list[Text]:
    """A prompt with its answer, bare and (given a chat template) in chat."""
    bare = f"{prompt} {answer}".strip()
    texts = [Text(source, 0, bare)]
    if answer and tokenizer.chat_template:
        rendered = render_turns(tokenizer, prompt, answer)
        texts.append(Text(f"{source} (chat)", 0, rendered, is_chat=True))
    return texts


def _record_texts(record: dict[str, Any], source: str, tokenizer: Any) -> list[Text]:
    texts: list[Text] = []
    for prompt_field, answer_field in PROMPT_FIELDS:
        answer = record.get(answer_field, "") if answer_field else ""
        # A field of a pair without its partner belongs to another pair of the table.
        if (answer_field and answer_field not in record) or not isinstance(answer, str):
            continue
        for prompt in _strings(record.get(prompt_field)):
            texts += turn_texts(source, prompt, answer, tokenizer)
    for value in record.values():
        if isinstance(value, dict):  # multilingual ZsRE nests one record per language
            texts += _record_texts(value, source, tokenizer)
    if not texts:
        whole = [v for v in record.values() if isinstance(v, str) and v.strip()]
        texts = [Text(source, 0, passage) for value in whole for passage in passages(value)]
    return texts


def _invented_texts(tokenizer: Any, seed: int, max_characters: int) -> list[Text]:
    texts: list[Text] = []
    characters = 0
    for number, (prompt, answer) in enumerate(invented_facts(seed)):
        found = turn_texts(QUESTIONS, prompt, answer, tokenizer)
        texts += [Text(text.source, number, text.content, text.is_chat) for text in found]
        characters += sum(len(text.content) for text in found)
        if characters >= max_characters:
            break
    return texts


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and v.strip()]


def _files_of(spec: str) -> list[Path]:
    if spec.startswith(PACKAGE):
        return _package_files(spec.removeprefix(PACKAGE))
    path = Path(spec)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in PROSE + RECORDS and f.is_file())
        if not files:
            raise MicroEditError(f"{path} holds no {', '.join(PROSE + RECORDS)} file")
        return files
    if not path.is_file():
        raise MicroEditError(f"{spec} is no file, folder or package:NAME to take text from")
    return [path]


def _package_files(name: str) -> list[Path]:
    try:
        found = distribution(name).files or []
    except (PackageNotFoundError, ValueError) as error:
        raise MicroEditError(
            f"the package {name!r} is not installed; install it with `pip install {name}`"
        ) from error
    files = [
        Path(str(file.locate()))
        for file in found
        if file.suffix in PROSE and not file.parts[0].endswith(".dist-info")
    ]
    if not files:
        raise MicroEditError(f"the package {name!r} holds no {', '.join(PROSE)} file")
    return sorted(files)


def _source_name(spec: str) -> str:
    return spec if spec.startswith(PACKAGE) else Path(spec).name


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MicroEditError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise MicroEditError(f"{path} cannot be read ({error.strerror})") from error
