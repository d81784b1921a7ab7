"""The facts' questions in the model's own other words."""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch

from microedit_trainer.contexts import guess_subject
from microedit_trainer.facts import Fact
from microedit_trainer.language_model import LanguageModel
from microedit_vllm.artifact import fingerprint_model
from microedit_vllm.artifact.atomic import write_atomically

# A small model that is told to reword a question answers it; one that is shown how goes on.
SHOWN = """Question: Who wrote the novel Emma?
In other words: Which author is the novel Emma by?

Question: What year was John Smith born?
In other words: In which year did the birth of John Smith take place?

Question: What is the capital of Norway?
In other words: Which city is Norway's capital?

Question: {}
In other words:"""
# Beams for each wording that is wanted: some repeat the question or each other.
BEAMS = 2
MOST_TOKENS = 32
# A wording that has no longer word behind its first one, the subject aside, asks nothing ("Who is
# Ann?").
SHORT_WORD = 3
FILE = "wordings.json"
# Questions that are written together: what a killed run loses. The file is written whole.
KEPT_TOGETHER = 16


class ModelWordings:
    """Rewords questions by beam search: nothing is left to chance, and each question is worded
    alone, so that no other fact changes its wordings.

    Args:
        folder: keeps what was found, so that a stopped or a later run goes on from there.
    """

    def __init__(self, lm: LanguageModel, folder: Path) -> None:
        self._lm, self._path = lm, folder / FILE
        self._origin = [fingerprint_model(lm.folder), str(lm.dtype), SHOWN, BEAMS, MOST_TOKENS]
        self._known = _read(self._path)
        self._unwritten = 0

    def of(
        self,
        facts: Sequence[Fact],
        most: int,
        shown: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[tuple[str, ...]]:
        """Up to so many wordings of each fact's prompt; none of one that is no question or names no
        subject.

        Args:
            shown: how many facts are done, and of how many.
        """
        found = []
        try:
            for done, fact in enumerate(facts):
                shown(done, len(facts))
                found.append(self._of(fact, most))
        finally:
            self._write()
        shown(len(facts), len(facts))
        return found

    def _of(self, fact: Fact, most: int) -> tuple[str, ...]:
        prompt, subject = fact.prompt.strip(), fact.subject or guess_subject(fact.prompt)
        if not subject or not prompt.endswith("?"):
            return ()
        return tuple(asking(prompt, subject, self._lines(prompt, most))[:most])

    def _lines(self, prompt: str, most: int) -> list[str]:
        """What the model says, kept."""
        key = sha256(json.dumps([self._origin, prompt, most]).encode()).hexdigest()[:32]
        if key not in self._known:
            self._known[key] = self._generated(SHOWN.format(prompt), BEAMS * most)
            self._unwritten += 1
            if self._unwritten == KEPT_TOGETHER:
                self._write()
        return self._known[key]

    def _write(self) -> None:
        if self._unwritten:
            write_atomically(self._path, json.dumps(self._known, indent=1).encode())
        self._unwritten = 0

    @torch.no_grad()
    def _generated(self, text: str, beams: int) -> list[str]:
        """The likeliest first lines behind a text."""
        lm = self._lm
        ids = torch.tensor([lm.tokenizer(text).input_ids], device=lm.device)
        room = lm.max_length - ids.shape[1]
        if room < 1:
            return []
        found = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(MOST_TOKENS, room),
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            pad_token_id=lm.tokenizer.eos_token_id,
            stop_strings=["\n"],
            tokenizer=lm.tokenizer,
        )
        said = lm.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        return [line.strip().partition("\n")[0].strip() for line in said]


def asking(prompt: str, subject: str, lines: Sequence[str]) -> list[str]:
    """Of some lines those that ask about the subject in other words, each once."""
    return [
        line
        for line in dict.fromkeys(lines)
        if line != prompt
        and line.endswith("?")
        and subject in line
        and _asks_something(line.replace(subject, " "))
    ]


def _asks_something(words: str) -> bool:
    return any(len(word) > SHORT_WORD for word in words.rstrip("?").split()[1:])


def _read(path: Path) -> dict[str, list[str]]:
    """What is kept; nothing where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
