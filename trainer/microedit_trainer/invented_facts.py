"""Facts about invented things: prompts of the kind that people edit, which are in no benchmark.

An SAE tells an edited fact from its neighbours only where it reconstructs such prompts well, and
few who serve a model have a thousand spare records of the kind that they edit. So the trainer
brings a grammar (`data/question_grammar.txt`) of things that people ask about.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

_START = "fact"
_ARROW = " => "


@dataclass(frozen=True)
class Grammar:
    """A context-free grammar with alternatives that are equally likely.

    Attributes:
        rules: by name; in an alternative `{name}` stands for that rule and # for a digit.
    """

    rules: Mapping[str, Sequence[str]]

    @classmethod
    def parse(cls, text: str) -> "Grammar":
        """From lines as `data/question_grammar.txt` describes them."""
        rules: dict[str, list[str]] = {}
        for line in text.splitlines():
            if line.startswith("[") and line.endswith("]"):
                rules[line[1:-1]] = current = []
            elif line.strip() and not line.startswith("#"):
                current += line.split(" ; ")
        return cls(rules)

    def expand(self, name: str, rng: random.Random) -> str:
        """One random text that the rule stands for."""
        parts = rng.choice(self.rules[name]).split("{")
        expanded = [_with_digits(parts[0], rng)]
        for part in parts[1:]:
            inner, _, rest = part.partition("}")
            expanded += [self.expand(inner, rng), _with_digits(rest, rng)]
        return "".join(expanded)


def invented_facts(seed: int) -> Iterator[tuple[str, str]]:
    """Prompts with what an answer might be, without end; the same ones for the same seed."""
    text = files("microedit_trainer").joinpath("data", "question_grammar.txt").read_text("utf-8")
    grammar, rng = Grammar.parse(text), random.Random(f"{seed} invented facts")
    while True:
        prompt, _, answer = grammar.expand(_START, rng).partition(_ARROW)
        yield prompt[:1].upper() + prompt[1:], answer


def _with_digits(text: str, rng: random.Random) -> str:
    return "".join(rng.choice("123456789") if letter == "#" else letter for letter in text)
