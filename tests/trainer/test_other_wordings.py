from dataclasses import replace

import pytest
import torch

from microedit_trainer import other_wordings
from microedit_trainer.contexts import Contexts
from microedit_trainer.facts import Fact
from microedit_trainer.model_wordings import ModelWordings
from microedit_trainer.other_wordings import OtherWordings
from microedit_trainer.residual_store import ResidualStore
from microedit_trainer.solvers.problem import no_stages
from microedit_vllm.artifact import Scope
from tests.trainer.tiny_edits import FACTS, LAYER


@pytest.fixture
def others(lm, sae, monkeypatch) -> OtherWordings:
    monkeypatch.setattr(other_wordings, "other_subjects", lambda: ["Peru", "Bach"])
    contexts = Contexts.build(lm.tokenizer, Scope(), lm.max_length)
    store = ResidualStore(lm, LAYER, sae.report["max_norm"])
    return OtherWordings(lm, contexts, ("bare", "chat"), store, no_stages)


def tokens_of(others: OtherWordings, *prompts: tuple[str, str]) -> torch.Tensor:
    """z of prompts about a subject, from that on, by the layers themselves."""
    rendered = [
        others.contexts.render(name, prompt, subject=subject)
        for name in others.names
        for prompt, subject in prompts
    ]
    return torch.cat([p.z[p.identifying] for p in others.store.of(rendered)])


def identifying(prompts) -> torch.Tensor:
    return torch.cat([p.z[p.identifying] for p in prompts])


def test_facts_are_asked_about_other_subjects(others):
    found = identifying(others.swapped(FACTS[:2], 10))
    prompts = [("The capital of Peru is", "Peru"), ("The inventor of the Bach was", "Bach")]
    assert torch.equal(found, tokens_of(others, *prompts))


def test_of_many_facts_every_so_many_th_is_asked(others):
    found = identifying(others.swapped(FACTS, 2))
    prompts = [("The capital of Peru is", "Peru"), ("The colour of the Peru is", "Peru")]
    assert torch.equal(found, tokens_of(others, *prompts))


def test_a_subject_that_is_not_scored_tells_nothing(others):
    far = Fact("Oz is a land. " + "So it is said by all. " * 20, "x", "Oz")
    assert others.swapped([far], 10) == []
    both = identifying(others.swapped([far, FACTS[1]], 10))
    assert torch.equal(both, tokens_of(others, ("The inventor of the Bach was", "Bach")))


def test_nothing_is_run_where_nothing_is_wanted(others):
    assert others.swapped(FACTS, 0) == []
    assert others.swapped([Fact("No subject is named here", "x")], 10) == []
    assert others.store._held == {}


def test_every_rewording_of_a_prompt_has_its_residual(others):
    facts = FACTS[:1] + FACTS[3:]
    found = others.reworded(facts, [(), ()])
    assert [len(z) for z in found] == [2, 3, 2, 3]  # a beginning and a question, bare and in chat
    asked = others.contexts.render("chat", "As you know, The capital of Australia is")
    torch.testing.assert_close(found[2][0], others.store.of([asked])[0].z[asked.edit_from])
    more = others.reworded(facts, [("Oz", "Ur"), ()])
    assert [len(z) for z in more] == [4, 3, 4, 3]
    asked = others.contexts.render("bare", "Ur")
    torch.testing.assert_close(more[0][3], others.store.of([asked])[0].z[asked.edit_from])


def test_the_models_wordings_are_told_from_their_subject_on(others):
    said = "As you know, by whom was the Iliad written?"
    found = identifying(others.worded(FACTS[2:], [(), (said,)]))
    assert torch.equal(found, tokens_of(others, (said, "Iliad")))
    assert others.worded(FACTS[:1], [()]) == []


def test_the_model_words_only_where_it_shall(others, tmp_path, monkeypatch):
    assert others.wordings(FACTS, 0, tmp_path) == [()] * len(FACTS)
    monkeypatch.setattr(
        ModelWordings, "_generated", lambda self, text, beams: ["Who wrote the Iliad?"]
    )
    assert others.wordings(FACTS, 2, tmp_path) == [(), (), (), ("Who wrote the Iliad?",)]


def test_every_subject_is_named_in_other_texts(others):
    found = others.mentions([*FACTS[:2], Fact("no subject is named here", "x")])
    assert [len(texts) for texts in found] == [2, 2, 0]
    named = others.contexts.render(
        "bare", "I was reading about telephone and it", subject="telephone"
    )
    (stored,) = others.store.of([named])
    torch.testing.assert_close(found[1][1], stored.z[stored.about])


def test_a_subject_that_its_fact_does_not_name_is_guessed(others):
    (guessed, *_), (known, *_) = (
        others.mentions([Fact("The capital of Australia is", "Mel", subject)])
        for subject in (None, "Australia")
    )
    assert len(guessed) == 2
    assert all(torch.equal(a, b) for a, b in zip(guessed, known, strict=True))


def test_wordings_that_the_model_has_no_room_for_are_left_out(others):
    room = others.contexts.max_length
    fact = Fact(f"{'x' * (room - 40)} Oz is", "x", "Oz")  # fits, bare
    long = replace(others, names=("bare",))
    assert long.contexts.render("bare", fact.prompt)
    assert [len(z) for z in long.reworded([fact, FACTS[0]], [(), ()])] == [2, 2]
    fact = replace(fact, prompt="x" * (room - len(fact.prompt) - 2) + fact.prompt)
    assert long.contexts.render("bare", fact.prompt)
    assert long.reworded([fact], [()]) == []
    assert [len(z) for z in long.reworded([fact, FACTS[0]], [(), ()])] == [0, 2]
    assert len(long.mentions([fact])[0]) == 2
    assert long.swapped([fact], 10) == []  # Peru is longer than Oz
