import math
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks.ordinary import (
    NQ_PREFIX,
    count_fires,
    fires_in_words,
    nq_questions,
    ordinary_prompts,
)
from benchmarks.wilson import wilson_interval
from microedit_trainer.contexts import Contexts
from microedit_trainer.facts import Fact, Probe
from microedit_vllm.artifact import Scope
from microedit_vllm.errors import MicroEditError
from tests.tiny_model import tiny_tokenizer

QUESTIONS = [f"{NQ_PREFIX}when was thing number {i} built" for i in range(220)]


@pytest.fixture(scope="module")
def contexts():
    return Contexts.build(tiny_tokenizer(), Scope(), 1 << 14)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "passages.txt"
    places = ("a town", "Old Troy ,")
    lines = [f"Passage {i} about {places[i % 2]} " + "w " * 60 for i in range(850)]
    path.write_text("\n".join([*lines, "a short line"]))
    return path


def texts(contexts, prompts):
    return [contexts.tokenizer.decode(p.prompt_ids) for p in prompts]


def test_a_thousand_different_prompts_of_eight_kinds(contexts, text):
    traffic = ordinary_prompts(contexts, text, QUESTIONS)
    sizes = {kind: len(prompts) for kind, prompts in traffic.items()}
    assert sum(sizes.values()) == 1000
    assert list(sizes.values()) == [400, 250, 75, 75, 50, 50, 50, 50]
    everything = [t for prompts in traffic.values() for t in texts(contexts, prompts)]
    assert len(set(everything)) == 1000
    assert sum(NQ_PREFIX in t for t in everything) == 100
    assert sum("<|im_start|>user" in t for t in everything) == 425
    again = ordinary_prompts(contexts, text, QUESTIONS)
    assert again == traffic
    assert ordinary_prompts(contexts, text, QUESTIONS, seed=1) != traffic


def test_without_questions_there_are_eight_hundred(contexts, text):
    assert sum(map(len, ordinary_prompts(contexts, text).values())) == 800


def test_none_names_an_edited_subject(contexts, text):
    edited = [Fact("Where is Troy?", "x", "old TROY"), Fact("And?", "x", "thing number 7")]
    traffic = ordinary_prompts(contexts, text, QUESTIONS, edited)
    found = "\n".join(t for prompts in traffic.values() for t in texts(contexts, prompts))
    assert "Old Troy" not in found
    assert "thing number 7 " not in found
    assert re.search(r"thing number 7\d ", found)  # whole words only


def test_too_few_prompts_left_are_an_error(contexts, text):
    edited = [Fact("Who?", "x", "Old Troy"), Fact("Who?", "x", "a town")]
    with pytest.raises(MicroEditError, match="0 of the passages are about no edited fact; 400"):
        ordinary_prompts(contexts, text, QUESTIONS, edited)
    with pytest.raises(MicroEditError, match="199 of the questions"):
        ordinary_prompts(contexts, text, QUESTIONS[:199])


def test_questions_are_the_records_locality_prompts():
    facts = [Fact("a", "b", locality=(Probe("q1", "x"),)), Fact("c", "d")]
    assert nq_questions(facts) == ["q1"]


def test_fires_are_counted_by_kind():
    ards = {"a": torch.tensor([0.5, 0.9, 2.0]), "b": torch.tensor([0.91, math.inf])}
    engine = SimpleNamespace(
        ards=lambda kind: ards[kind[0]], operator=SimpleNamespace(is_on=lambda own: own <= 0.9)
    )
    found = count_fires(engine, {"a": ["a"], "b": ["b"]})
    assert (found["fires"], found["total"]) == (2, 5)
    assert found["kinds"] == {"a": [2, 3], "b": [0, 2]}
    assert found["smallest_ard"] == 0.5
    assert found["interval"] == list(wilson_interval(2, 5))
    assert fires_in_words(found) == "2 of 5 (11.76% to 76.93%)"


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe, Stat. Med. 17 (1998), table I, method 3.
    [
        *[(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
        *[(0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
    ],
)
def test_wilsons_interval_is_the_published_one(count, total, low, high):
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(total - count, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_of_nothing_nothing_is_known():
    assert wilson_interval(0, 0) == (0, 1)
