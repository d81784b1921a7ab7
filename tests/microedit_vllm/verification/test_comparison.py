import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from microedit_vllm.artifact import EditSet
from microedit_vllm.errors import MicroEditError
from microedit_vllm.verification import Observation, Report, compare
from microedit_vllm.verification.comparison import num_tokens
from tests.builders import tiny_edit_set, tiny_sae

UNKNOWN = (99, 99)


@pytest.fixture(scope="module")
def edit_set() -> EditSet:
    return tiny_edit_set(tiny_sae())


def as_expected(edit_set: EditSet) -> list[Observation]:
    return [Observation(p.ard, p.on, p.edited, p.plain) for p in edit_set.golden_prompts]


def scaled(edit_set: EditSet, factor: float) -> list[Observation]:
    """Every ARD times a factor, and the switch as it then decides."""
    tau = edit_set.manifest.decision.tau
    return [replace(o, ard=o.ard * factor, on=o.ard * factor <= tau) for o in as_expected(edit_set)]


def names(report: Report) -> list[str]:
    return [finding.name for finding in report.findings]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_trainer_computed_has_no_findings(edit_set, dtype):
    report = compare(edit_set, as_expected(edit_set), dtype)
    assert report.findings == []
    assert report.deviations["right"] == 0.0
    assert report.deviations["layer_after"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("name", "factor", "said"),
    [
        ("layer_before", 1.5, "one layer too early"),
        ("layer_after", 2.0, "one layer too late"),
        ("hidden_states_alone", 3.0, "before the residual is summed: from hidden_states alone"),
    ],
)
@pytest.mark.parametrize("noise", [1.0, 1.04])
def test_a_misreading_is_named_by_the_nearest(edit_set, name, factor, said, noise):
    report = compare(edit_set, scaled(edit_set, factor * noise), "bfloat16")
    assert names(report) == [name]
    assert said in report.findings[0].message


def test_an_ard_that_nothing_explains_is_said_to_be_just_that(edit_set):
    report = compare(edit_set, scaled(edit_set, 0.5), "bfloat16")
    assert names(report) == ["ard_differs"]


def test_a_misreading_that_not_every_prompt_knows_is_not_named(edit_set):
    first, *rest = edit_set.golden_prompts
    poorer = replace(edit_set, golden_prompts=(first.model_copy(update={"misread": {}}), *rest))
    assert names(compare(poorer, scaled(edit_set, 1.5), "bfloat16")) == ["ard_differs"]


@pytest.mark.parametrize(
    ("factor", "set_dtype", "served", "found"),
    [
        (1.04, "bfloat16", "bfloat16", []),
        (1.04, "bfloat16", "float32", []),
        (1.04, "float32", "bfloat16", []),
        (1.001, "float32", "float32", []),
        (1.04, "float32", "float32", ["ard_differs"]),
        (1.10, "bfloat16", "bfloat16", ["ard_differs"]),
    ],
)
def test_the_coarser_of_both_dtypes_sets_the_tolerance(edit_set, factor, set_dtype, served, found):
    model = edit_set.manifest.model.model_copy(update={"dtype": set_dtype})
    manifest = edit_set.manifest.model_copy(update={"model": model})
    made = replace(edit_set, manifest=manifest)
    assert names(compare(made, scaled(edit_set, factor), served)) == found


def test_one_prompt_far_off_is_found_where_the_mean_is_not(edit_set):
    observations = as_expected(edit_set)
    observations[1] = replace(observations[1], ard=observations[1].ard * 1.24)
    many = replace(edit_set, golden_prompts=edit_set.golden_prompts * 2)
    found = compare(many, [*observations, *as_expected(edit_set)], "bfloat16")
    assert found.deviations["right"] < 0.05
    assert names(found) == ["ard_differs"]


def test_something_scored_where_nothing_should_be_and_the_other_way_round(edit_set):
    for index, ard in enumerate([None, 1.0]):
        prompts = [*edit_set.golden_prompts]
        observations = as_expected(edit_set)
        prompts[1] = prompts[1].model_copy(update={"ard": 1.0 if index == 0 else None})
        observations[1] = replace(observations[1], ard=ard)
        changed = replace(edit_set, golden_prompts=tuple(prompts))
        assert names(compare(changed, observations, "bfloat16")) == ["ard_differs"]


@pytest.mark.parametrize("on", [None, False], ids=["no decision", "nothing scored"])
def test_a_patch_that_never_ran(edit_set, on):
    observations = [Observation(None, on, o.plain, o.plain) for o in as_expected(edit_set)]
    assert names(compare(edit_set, observations, "bfloat16")) == ["patch_never_ran"]


def test_a_decision_that_is_not_known_any_more(edit_set):
    observations = as_expected(edit_set)
    observations[2] = replace(observations[2], ard=None, on=None)
    assert names(compare(edit_set, observations, "bfloat16")) == ["decisions_unknown"]


def test_another_decision_at_the_same_ard(edit_set):
    observations = as_expected(edit_set)
    observations[1] = replace(observations[1], on=True)
    assert names(compare(edit_set, observations, "bfloat16")) == ["switch_differs"]


def changed(edit_set: EditSet, change: Callable[[Observation], Observation]) -> Report:
    return compare(edit_set, [change(o) for o in as_expected(edit_set)], "bfloat16")


def test_an_edit_that_is_decided_and_not_made(edit_set):
    assert names(changed(edit_set, lambda o: replace(o, edited=o.plain))) == ["edit_not_applied"]


def test_another_edited_answer(edit_set):
    found = changed(edit_set, lambda o: replace(o, edited=UNKNOWN))
    assert names(found) == ["edited_answers_differ"]


def test_another_plain_answer_is_another_model(edit_set):
    found = changed(edit_set, lambda o: replace(o, plain=UNKNOWN))
    assert names(found) == ["plain_answers_differ"]


def test_tokens_behind_the_clear_ones_do_not_count(edit_set):
    longer = changed(edit_set, lambda o: replace(o, edited=(*o.edited, 1), plain=(*o.plain, 2, 3)))
    assert longer.findings == []


@pytest.mark.parametrize(("wrong", "found"), [(1, []), (2, ["plain_answers_differ"])])
def test_a_few_answers_may_be_turned_over_by_rounding_in_bf16_alone(edit_set, wrong, found):
    twice = replace(edit_set, golden_prompts=edit_set.golden_prompts * 2)
    observations = as_expected(twice)
    for index in range(wrong):
        observations[index] = replace(observations[index], plain=UNKNOWN)
    assert names(compare(twice, observations, "bfloat16")) == found


def test_enough_tokens_are_asked_for(edit_set):
    prompt = edit_set.golden_prompts[0]
    assert num_tokens(prompt) == 2
    assert num_tokens(prompt.model_copy(update={"plain": (1, 2, 3)})) == 3
    assert num_tokens(prompt.model_copy(update={"plain": (), "edited": ()})) == 1


def test_a_set_without_golden_prompts_must_be_made_again(edit_set):
    with pytest.raises(MicroEditError, match=r"no golden prompts.*make it again"):
        compare(replace(edit_set, golden_prompts=()), [], "bfloat16")
