import random
import re
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest

from microedit_trainer.invented_facts import Grammar, invented_facts

DATA = Path(__file__).parents[3] / "shared" / "data"
SHIPPED = files("microedit_trainer").joinpath("data", "question_grammar.txt").read_text("utf-8")


def test_rules_expand_into_one_another_and_signs_into_digits():
    grammar = Grammar.parse(
        "# no rule\n[fact]\n{ship} sails => {year}\n\n[ship]\nHMS A\n[year]\n1##"
    )
    prompt = grammar.expand("fact", random.Random(0))
    assert re.fullmatch(r"HMS A sails => 1[1-9][1-9]", prompt)


def test_a_line_of_several_alternatives_gives_each():
    grammar = Grammar.parse("[a]\none ; two\nthree")
    rng = random.Random(0)
    assert {grammar.expand("a", rng) for _ in range(50)} == {"one", "two", "three"}


def test_every_rule_that_the_shipped_grammar_names_is_there_and_used():
    rules = Grammar.parse(SHIPPED).rules
    named = set(re.findall(r"\{(\w+)\}", SHIPPED.partition("[fact]")[2]))
    assert named == set(rules) - {"fact"}
    assert all(alternative.count(" => ") == 1 for alternative in rules["fact"])


def test_facts_are_many_whole_and_the_same_for_a_seed():
    facts = list(islice(invented_facts(0), 3000))
    assert facts == list(islice(invented_facts(0), 3000)) != list(islice(invented_facts(1), 3000))
    assert len(set(facts)) > 2900
    assert not [text for fact in facts for text in fact if not text or set("{}#=") & set(text)]


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data here")
@pytest.mark.parametrize("file", ["zsre_dev.jsonl", "counterfact_dev.jsonl"])
def test_no_benchmark_record_is_among_them(file):
    """A name may be a benchmark's by chance; a prompt must not."""
    read = (DATA / file).read_text(encoding="utf-8")
    assert not [prompt for prompt, _ in islice(invented_facts(0), 5000) if f'"{prompt}"' in read]
