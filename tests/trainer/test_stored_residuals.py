from dataclasses import replace

import pytest
import torch

from microedit_trainer.contexts import Contexts, PromptTokens
from microedit_trainer.stored_residuals import (
    StoredPrompt,
    answer_nll,
    predictions,
    run_upper,
    store_residuals,
)
from microedit_vllm.artifact import Scope
from tests.trainer.tiny_edits import FACTS, LAYER

PROMPT = PromptTokens(
    prompt_ids=tuple(range(10)), answer_ids=(20, 21), end_id=2, scored=(1, 9), subject_start=5
)


def stored(sinks: tuple[int, ...] = (), **changes) -> StoredPrompt:
    is_sink = torch.zeros(12, dtype=torch.bool)
    is_sink[list(sinks)] = True
    return StoredPrompt(replace(PROMPT, **changes), torch.randn(12, 4), is_sink)


@pytest.fixture(scope="module")
def rendered(lm):
    contexts = Contexts.build(lm.tokenizer, Scope(), lm.max_length)
    return [contexts.render(n, f.prompt, f.target) for n in ("chat", "bare") for f in FACTS]


def test_positions_of_one_prompt():
    prompt = stored()
    assert prompt.z[prompt.edited].shape == (3, 4)
    assert prompt.edited.start == 9
    assert prompt.answer_with_end.tolist() == [20, 21, 2]
    assert prompt.scored.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert prompt.identifying.tolist() == [5, 6, 7, 8]
    assert prompt.shared.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("start", "stop", "about"),
    [
        (4, 8, [5, 6, 7]),
        (5, 6, [5]),
        (0, 2, [1]),  # the prompt's first token is not scored
        (None, None, [1, 2, 3, 4, 5, 6, 7, 8]),
        (9, 10, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_a_prompt_is_about_the_end_of_its_subject(start, stop, about):
    assert stored(subject_start=start, subject_stop=stop).about.tolist() == about


def test_sinks_are_never_scored():
    prompt = stored(sinks=(0, 3, 6))
    assert prompt.scored.tolist() == [1, 2, 4, 5, 7, 8]
    assert prompt.identifying.tolist() == [5, 7, 8]
    assert prompt.shared.tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("start", "sinks"),
    [(None, ()), (9, ()), (8, (8,)), (0, ())],
    ids=["unknown", "behind", "sink", "first"],
)
def test_without_tokens_from_the_subject_on_all_scored_ones_identify(start, sinks):
    prompt = stored(sinks=sinks, subject_start=start)
    assert prompt.identifying.tolist() == prompt.scored.tolist()
    assert prompt.shared.tolist() == []


def test_residuals_are_those_of_each_prompt_alone(lm, rendered):
    done = []
    found = store_residuals(lm, LAYER, rendered, max_norm=1e9, batch=3, progress=done.append)
    assert sum(done) == len(rendered)
    for prompt, tokens in zip(found, rendered, strict=True):
        assert prompt.tokens == tokens
        alone = lm.lower(torch.tensor([[*tokens.prompt_ids, *tokens.answer_ids]]), LAYER)[0]
        torch.testing.assert_close(prompt.z, alone, rtol=1e-5, atol=1e-5)
        assert not bool(prompt.is_sink.any())


def test_tokens_of_outlier_norm_are_sinks(lm, rendered):
    z = store_residuals(lm, LAYER, rendered[:1], max_norm=1e9)[0].z
    limit = float(z.norm(dim=-1).median())
    (prompt,) = store_residuals(lm, LAYER, rendered[:1], max_norm=limit)
    assert prompt.is_sink.tolist() == (z.norm(dim=-1) > limit).tolist()


def test_predictions_are_the_models_own_under_teacher_forcing(lm, rendered):
    found = store_residuals(lm, LAYER, rendered, max_norm=1e9)
    answers = predictions(lm, LAYER, found, [p.z for p in found], batch=3)
    for tokens, answer in zip(rendered, answers, strict=True):
        ids = torch.tensor([[*tokens.prompt_ids, *tokens.answer_ids]])
        greedy = lm.model(input_ids=ids).logits[0].argmax(-1)
        first = tokens.edit_from
        assert answer.tolist() == greedy[first : first + len(tokens.answer_ids)].tolist()


def test_predictions_follow_the_residuals_that_they_are_given(lm, rendered):
    found = store_residuals(lm, LAYER, rendered[:2], max_norm=1e9)
    changed = [found[0].z, found[1].z.flip(-1)]
    plain = predictions(lm, LAYER, found, [p.z for p in found])
    edited = predictions(lm, LAYER, found, changed)
    assert torch.equal(edited[0], plain[0])
    assert not torch.equal(edited[1], plain[1])


def test_answers_are_as_likely_as_the_model_itself_finds_them(lm, rendered):
    found = store_residuals(lm, LAYER, rendered, max_norm=1e9)
    nll = answer_nll(lm, LAYER, found, [p.z for p in found], batch=3)
    for tokens, own in zip(rendered, nll, strict=True):
        ids = torch.tensor([[*tokens.prompt_ids, *tokens.answer_ids]])
        labels = ids.clone()
        labels[:, : len(tokens.prompt_ids)] = -100
        assert own.shape == (len(tokens.answer_ids),)
        assert float(own.mean()) == pytest.approx(
            float(lm.model(input_ids=ids, labels=labels).loss), rel=1e-4
        )


def test_the_upper_half_runs_sequences_of_any_length(lm, rendered):
    found = store_residuals(lm, LAYER, [rendered[0], rendered[-1]], max_norm=1e9)
    together = run_upper(lm, LAYER, [p.z for p in found])
    for row, prompt in enumerate(found):
        alone = run_upper(lm, LAYER, [prompt.z])[0]
        torch.testing.assert_close(together[row, : len(prompt.z)], alone, rtol=1e-4, atol=1e-4)
