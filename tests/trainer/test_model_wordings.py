import pytest

from microedit_trainer import model_wordings
from microedit_trainer.facts import Fact
from microedit_trainer.model_wordings import FILE, ModelWordings, asking
from tests.trainer.tiny_edits import FACTS

QUESTION = FACTS[3]


def test_what_asks_about_the_subject_in_other_words_is_kept_once():
    prompt = "Who wrote the Iliad in old Greece?"
    lines = [
        *("Which poet is the Iliad by?", prompt, "Which poet is the Iliad by?"),
        *("Who wrote the Odyssey?", "The Iliad was written by Homer.", "What is the Iliad?", ""),
        "Who wrote the Iliad?",
    ]
    assert asking(prompt, "Iliad", lines) == ["Which poet is the Iliad by?", "Who wrote the Iliad?"]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Questions that the model was asked to reword; it says three things of each."""
    asked = []

    def generated(self, text, beams):
        asked.append(text.splitlines()[-2].removeprefix("Question: "))
        return [f"Which {kind} is the Iliad by?" for kind in ("poet", "author", "bard")]

    monkeypatch.setattr(ModelWordings, "_generated", generated)
    return asked


def test_questions_that_name_their_subject_are_worded_anew(lm, tmp_path, said):
    nameless = Fact("who was it?", "x")
    shown = []
    found = ModelWordings(lm, tmp_path).of(
        [*FACTS, nameless], 2, lambda done, total: shown.append((done, total))
    )
    assert found == [
        (),
        (),
        (),
        ("Which poet is the Iliad by?", "Which author is the Iliad by?"),
        (),
    ]
    assert said == [QUESTION.prompt]
    assert shown == [(done, 5) for done in range(6)]


def test_what_was_found_is_kept_and_damage_counts_as_nothing(lm, tmp_path, said):
    first = ModelWordings(lm, tmp_path).of([QUESTION], 2)
    assert ModelWordings(lm, tmp_path).of([QUESTION], 2) == first
    assert len(said) == 1
    ModelWordings(lm, tmp_path).of([QUESTION], 3)
    assert len(said) == 2
    for damage in ("{", "[]"):
        (tmp_path / FILE).write_text(damage)
        assert ModelWordings(lm, tmp_path).of([QUESTION], 2) == first
    assert len(said) == 4


def test_a_stopped_run_keeps_what_was_found(lm, tmp_path, said):
    facts = [QUESTION, Fact("Who sang the Iliad to the king?", "x", "Iliad")]

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ModelWordings(lm, tmp_path).of(facts, 2, stop)
    ModelWordings(lm, tmp_path).of(facts, 2)
    assert said == [fact.prompt for fact in facts]


def test_a_model_words_by_itself_and_always_alike(lm, tmp_path, monkeypatch):
    """A tiny model says nothing that asks; what it says is one line each, and the same again."""
    monkeypatch.setattr(model_wordings, "SHOWN", "Question: {}\nIn other words:")
    found = [
        ModelWordings(lm, tmp_path / name)._generated("Question: Who?\nIn other words:", 4)
        for name in ("a", "b")
    ]
    assert found[0] == found[1] and len(found[0]) == 4
    assert not any("\n" in line for line in found[0])
    assert len(set(found[0])) > 1


def test_a_question_that_leaves_no_room_is_left_alone(lm, tmp_path):
    long = Fact(f"Who wrote the {'very ' * lm.max_length} old Iliad?", "x", "Iliad")
    assert ModelWordings(lm, tmp_path).of([long], 2) == [()]
