import pytest

from microedit_trainer.facts import Fact, apart_from, prompt_digest, read_split
from microedit_trainer.facts.split import split_facts
from microedit_vllm.errors import MicroEditError

FACTS = [Fact(f"The friend of number {n} is", "Al") for n in range(50)]


@pytest.mark.parametrize(("size", "held"), [(1, 1), (7, 7), (0.1, 5), (0.001, 1), (0.98, 49)])
def test_a_split_has_the_size_asked_for_and_loses_nothing(size, held):
    edited, held_out = split_facts(FACTS, size, seed=0)
    assert len(held_out) == held
    assert sorted([*edited, *held_out], key=FACTS.index) == FACTS
    assert edited == sorted(edited, key=FACTS.index)


def test_the_seed_decides_and_the_files_order_does_not():
    edited, held_out = split_facts(FACTS, 10, seed=3)
    assert split_facts(FACTS, 10, seed=3) == (edited, held_out)
    assert set(split_facts(FACTS[::-1], 10, seed=3)[1]) == set(held_out)
    assert set(split_facts(FACTS, 10, seed=4)[1]) != set(held_out)
    # Not simply the first or the last ones.
    assert held_out not in (FACTS[:10], FACTS[-10:])


def test_records_that_join_the_file_move_few_others():
    held_out = split_facts(FACTS, 0.2, seed=0)[1]
    more = [Fact(f"The enemy of number {n} is", "Bo") for n in range(10)]
    later = split_facts([*FACTS, *more], 0.2, seed=0)[1]
    assert len(set(held_out) & set(later)) >= 7


@pytest.mark.parametrize("seed", range(5))
def test_facts_that_share_a_prompt_stay_on_one_side(seed):
    """Else τ would be calibrated against the edit of that very prompt."""
    twins = [Fact(f"the  friend of NUMBER {n} is", "Bo") for n in range(50)]
    edited, held_out = split_facts([*FACTS, *twins], 20, seed)
    assert len(held_out) == 20
    prompts = [{" ".join(f.prompt.lower().split()) for f in side} for side in (edited, held_out)]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("seed", range(5))
def test_facts_about_one_subject_stay_on_one_side(seed):
    """Also where a chain of prompts and subjects links them."""
    facts = [
        Fact(f"{question} {n}?", "x", f"subject {n}" if linked else None)
        for n in range(20)
        for question, linked in (("Who is", True), ("What is", True), ("What is", False))
    ]
    edited, held_out = split_facts(facts, 12, seed)
    assert len(held_out) == 12
    numbers = [{f.prompt.split()[-1] for f in side} for side in (edited, held_out)]
    assert not numbers[0] & numbers[1]
    assert len(numbers[1]) == 4


def test_no_split_is_possible_within_one_subject():
    facts = [Fact(f"Question {n}?", "x", "Oz") for n in range(5)]
    with pytest.raises(MicroEditError, match="subject stay together"):
        split_facts(facts, 1, seed=0)


@pytest.mark.parametrize("size", [50, 51, 0.999])
def test_something_must_be_left_to_edit(size):
    with pytest.raises(MicroEditError, match="leaves nothing to edit"):
        split_facts(FACTS, size, seed=0)


@pytest.fixture
def data(write):
    return write(*({"prompt": f.prompt, "target": f.target} for f in FACTS))


@pytest.mark.parametrize("wanted", ["0", "-1", "1.0", "1.5", "0.0", "nan", "inf", "1e1"])
def test_a_number_that_is_no_size_is_refused(data, wanted):
    with pytest.raises(MicroEditError, match=f"--hold-out {wanted}: name a number"):
        read_split(data, wanted, seed=0)


def test_a_number_and_a_share_are_of_the_whole_file_and_the_limit_of_the_rest(data):
    split = read_split(data, "10", seed=1, limit=5)
    edited, held_out = split_facts(FACTS, 10, seed=1)
    assert (split.edited, split.held_out) == (edited[:5], held_out)
    assert split.description == f"10 of the 50 records of {data} (seed 1)"
    assert read_split(data, ".2", seed=1).held_out == held_out


def test_another_files_records_are_held_out_unless_they_are_edited(data, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("prompt,target\nWho is it?,Al\nthe friend of  number 3 is,Bo\n")
    split = read_split(data, str(other), seed=0, limit=4)
    assert split.edited == FACTS[:4]
    assert split.held_out == [Fact("Who is it?", "Al")]
    assert split.description == f"1 of the 2 records of {other}"
    # Number 3 is edited no longer.
    assert len(read_split(data, str(other), seed=0, limit=3).held_out) == 2


def test_records_about_an_edited_subject_are_not_held_out():
    edited = [Fact("Who found the bell?", "Al", "the bell")]
    again = Fact("By whom was the bell found?", "Bo", "The Bell ")
    same_words = Fact("Who found the  bell?", "Bo")
    other = Fact("Who found the horn?", "Bo", "the horn")
    assert apart_from(edited, [again, same_words, other]) == [other]


def test_a_file_whose_name_is_a_number_is_reached_by_its_path(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    (data.parent / "7").write_text("prompt,target\nWho is it?,Al\n")
    assert len(read_split(data, "7", seed=0).held_out) == 7
    assert len(read_split(data, "./7", seed=0).held_out) == 1


def test_a_digest_is_short_and_tells_prompts_apart():
    digests = {prompt_digest(fact.prompt) for fact in FACTS}
    assert len(digests) == 50
    assert {len(digest) for digest in digests} == {12}
