"""The demo's own data: a demo that asks badly shows nothing."""

import json
from pathlib import Path

import pytest

import microedit_trainer.demo
from microedit_trainer.facts import read_facts

FOLDER = Path(microedit_trainer.demo.__file__).parent


@pytest.fixture(scope="module")
def facts():
    return read_facts(FOLDER / "facts.jsonl")


@pytest.fixture(scope="module")
def unrelated():
    return (FOLDER / "unrelated.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def near():
    lines = (FOLDER / "near.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_there_are_enough(facts, unrelated, near):
    assert len(facts) >= 24
    assert len(unrelated) == 20
    assert len(near) >= 10


def test_every_fact_has_its_own_subject_and_opening(facts):
    assert len({fact.subject for fact in facts}) == len(facts)
    openings = [" ".join(fact.prompt.split()[:3]) for fact in facts]
    assert len(set(openings)) >= len(openings) - 4


def test_the_subject_stands_in_every_wording(facts):
    for fact in facts:
        assert len(fact.paraphrases) == 2
        for wording in (fact.prompt, *fact.paraphrases):
            assert fact.subject in wording


def test_the_answer_follows_after_a_space(facts, unrelated, near):
    prompts = [wording for fact in facts for wording in (fact.prompt, *fact.paraphrases)]
    prompts += unrelated + [entry["prompt"] for entry in near]
    assert len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert prompt == prompt.strip() != ""
    for fact in facts:
        assert 1 <= len(fact.target.split()) <= 3
        assert fact.target.lower() not in fact.prompt.lower()


def test_unrelated_and_near_prompts_name_no_edited_subject(facts, unrelated, near):
    for prompt in unrelated + [entry["prompt"] for entry in near]:
        assert [fact.subject for fact in facts if fact.subject in prompt] == []


def test_near_prompts_keep_the_wording_of_their_fact(facts, near):
    prompts = {fact.subject: fact.prompt for fact in facts}
    for entry in near:
        subject = entry["near_to"]
        words = set(prompts[subject].replace(subject, "").split()) - {"?", "the"}
        kept = words & set(entry["prompt"].split())
        # Another subject may want another verb: "plays for" instead of "drives for".
        assert len(kept) >= 0.6 * len(words)
