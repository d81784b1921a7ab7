"""`vllm.LLM` with an edit set, beside a plain one under the same schedule."""

from collections.abc import Iterator
from typing import Any

import pytest

from microedit_vllm.artifact import EditSet
from microedit_vllm.engine import decisions
from microedit_vllm.engine.golden_prompts import verify_llm
from tests.microedit_vllm.engine.synthetic import EDITED, OTHER, UNRELATED, running

OFF = {"microedit": "off"}
# (prompt, options); the plain engine ignores the options.
MIXED = [
    *((prompt, None) for prompt in EDITED),
    *((prompt, None) for prompt in UNRELATED),
    *((prompt, OFF) for prompt in EDITED),
]
UNTOUCHED = range(len(EDITED), len(MIXED))
# Longer than the scored window by more than a KV block.
DEEP = OTHER * 2 + EDITED[1]
# ARD counts in units of the unedited distance; bf16 sums in another order move it by this much.
ARD_NOISE = 0.02


def generate(llm: Any, requests: list[tuple[Any, Any]], tokens: int = 8, **params: Any) -> Any:
    """Outputs in the order of the requests, which are all there before the first step.

    Without the pause they would trickle in, and two runs of one batch would not have the same
    schedule.
    """
    from vllm import SamplingParams

    params = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 3} | params
    sampling = [SamplingParams(extra_args=options, **params) for _, options in requests]
    llm.sleep(level=0, mode="keep")
    try:
        llm.enqueue([prompt for prompt, _ in requests], sampling, use_tqdm=False)
    finally:
        llm.wake_up(tags=["scheduling"])
    return llm.wait_for_completion(use_tqdm=False)


def token_ids(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def logprobs(output: Any) -> list[dict[int, float]]:
    steps = output.outputs[0].logprobs
    return [{token: entry.logprob for token, entry in step.items()} for step in steps]


@pytest.fixture(scope="module")
def plain(smollm2) -> Any:
    """`MIXED` on an engine without edits, which has ended by now."""
    with running(smollm2) as llm:
        return generate(llm, MIXED)


@pytest.fixture(scope="module")
def llm(smollm2, edit_set, plain) -> Iterator[Any]:
    setting = {"microedit": {"edit_set": str(edit_set)}}
    with running(smollm2, additional_config=setting) as engine:
        yield engine


@pytest.fixture(autouse=True)
def cold_cache(llm) -> None:
    llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def mixed(llm) -> Any:
    llm.reset_prefix_cache()
    return generate(llm, MIXED)


def test_edited_prompts_change(plain, mixed):
    for index in range(len(EDITED)):
        assert token_ids(mixed[index]) != token_ids(plain[index])


def test_everything_else_is_bit_for_bit_the_plain_engine(plain, mixed):
    for index in UNTOUCHED:
        assert token_ids(mixed[index]) == token_ids(plain[index])
        assert logprobs(mixed[index]) == logprobs(plain[index])


def test_decisions_are_those_of_the_operator(llm, mixed, residuals, operator):
    """Long prompts are cut by max_num_batched_tokens inside their scored windows."""
    found = decisions(llm, [output.request_id for output in mixed])
    for (prompt, options), output in zip(MIXED, mixed, strict=True):
        record = found[output.request_id]
        if options == OFF:
            assert record == {"edit_set": "set", "ard": None, "tau": 0.6, "on": False}
            continue
        assert record["ard"] == pytest.approx(residuals.ard(operator, prompt), abs=ARD_NOISE)
        assert record["on"] is (prompt in EDITED)


def test_golden_prompts_are_as_transformers_computed_them(llm, edit_set):
    report = verify_llm(llm, EditSet.load(edit_set))
    assert [prompt.on for prompt in report.prompts] == [True] * 2 + [False] * 4
    assert report.findings == []


def test_unknown_requests_are_left_out(llm, mixed):
    assert decisions(llm, ["no such request"]) == {}


def test_a_repeated_prompt_hits_the_cache_as_ever_and_answers_the_same(llm):
    """The distances of its window lie beside the blocks that the first one left."""
    (first,), (second,) = generate(llm, [(DEEP, None)]), generate(llm, [(DEEP, None)])
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (len(first.prompt_token_ids) - 1) // 32 * 32 > 64
    assert token_ids(second) == token_ids(first)
    found = decisions(llm, [first.request_id, second.request_id])
    ards = [found[output.request_id]["ard"] for output in (first, second)]
    assert ards[1] == pytest.approx(ards[0], abs=ARD_NOISE)
    assert all(record["on"] for record in found.values())


def test_no_block_with_an_edited_token_is_found_by_another_request(llm):
    (edited,) = generate(llm, [(EDITED[1], None)], tokens=80)
    whole = {"prompt_token_ids": [*edited.prompt_token_ids, *token_ids(edited)]}
    (off,) = generate(llm, [(whole, OFF)])
    e = len(edited.prompt_token_ids) - 1
    assert off.num_cached_tokens == e // 32 * 32
    llm.reset_prefix_cache()
    (fresh,) = generate(llm, [(whole, OFF)])
    assert fresh.num_cached_tokens == 0
    assert token_ids(off) == token_ids(fresh)


def test_requests_with_edits_off_use_the_cache_as_ever(llm):
    generate(llm, [(DEEP, OFF)])
    (again,) = generate(llm, [(DEEP, OFF)])
    assert again.num_cached_tokens == (len(again.prompt_token_ids) - 1) // 32 * 32


def test_what_an_off_request_cached_does_not_hide_the_window(llm):
    (alone,) = generate(llm, [(DEEP, None)])
    llm.reset_prefix_cache()
    generate(llm, [(DEEP, OFF)])
    (after,) = generate(llm, [(DEEP, None)])
    window = len(after.prompt_token_ids) - 1 - 64
    assert after.num_cached_tokens == window // 32 * 32 > 0
    assert token_ids(after) == token_ids(alone)


def test_the_answer_of_a_request_that_stays_off_is_reused_as_ever(llm):
    """A second turn behind an answer of the first; the plain engine would reuse as much."""
    (first,) = generate(llm, [(UNRELATED[3], None)], tokens=70)
    known = [*first.prompt_token_ids, *token_ids(first)]
    turn = {"prompt_token_ids": [*known, *first.prompt_token_ids[-65:]]}
    (second,) = generate(llm, [(turn, None)])
    assert second.num_cached_tokens == (len(known) - 1) // 32 * 32


def test_edit_from_scores_an_answer_as_it_was_generated(llm):
    (generated,) = generate(llm, [(EDITED[0], None)])
    prompt, answer = generated.prompt_token_ids, token_ids(generated)
    options = {"microedit_edit_from": len(prompt) - 1}
    (scored,) = generate(
        llm, [({"prompt_token_ids": [*prompt, *answer]}, options)], tokens=1, prompt_logprobs=1
    )
    steps = zip(answer, scored.prompt_logprobs[len(prompt) :], logprobs(generated), strict=True)
    for token, teacher_forced, step in steps:
        assert teacher_forced[token].logprob == pytest.approx(step[token], abs=0.2)
    found = decisions(llm, [generated.request_id, scored.request_id])
    ards = [found[output.request_id]["ard"] for output in (generated, scored)]
    assert ards[1] == pytest.approx(ards[0], abs=ARD_NOISE)


def test_preemption_and_recomputation_keep_the_decision(llm):
    (alone,) = generate(llm, [(EDITED[1], None)], tokens=60)
    before = preemptions(llm)
    llm.reset_prefix_cache()
    requests = [(EDITED[1], None), (EDITED[1], OFF)] * 4
    outputs = generate(llm, requests, tokens=60)
    assert preemptions(llm) > before
    found = decisions(llm, [output.request_id for output in [alone, *outputs]])
    wanted = found[alone.request_id]["ard"]
    for (_, options), output in zip(requests, outputs, strict=True):
        record = found[output.request_id]
        assert record["on"] is (options != OFF)
        if options != OFF:
            assert record["ard"] == pytest.approx(wanted, abs=ARD_NOISE)
            assert token_ids(output)[:8] == token_ids(alone)[:8]


def preemptions(llm: Any) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


@pytest.mark.parametrize("options", [{"microedit": "maybe"}, {"microedit_edit_from": 999}])
def test_a_bad_option_is_a_value_error_and_the_engine_lives_on(llm, options):
    with pytest.raises(ValueError, match="vllm_xargs"):
        generate(llm, [(EDITED[0], options)])
    assert generate(llm, [(UNRELATED[0], None)])
