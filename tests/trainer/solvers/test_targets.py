import pytest
import torch
import torch.nn.functional as F

from microedit_trainer.solvers.targets import TargetSettings, solve_targets
from microedit_trainer.stored_residuals import predictions
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, stored_prompts


@pytest.fixture(scope="module")
def prompts(lm, sae):
    return [p for fact in stored_prompts(lm, sae, FACTS) for p in fact]


def changed(prompt, delta):
    z = prompt.z.clone()
    z[prompt.edited] += delta
    return z


@torch.no_grad()
def cross_entropy(lm, prompt, z) -> float:
    hidden = lm.upper(z[None], LAYER)[0, prompt.edited]
    return float(F.cross_entropy(lm.logits(hidden), prompt.answer_with_end))


def test_targets_make_the_answer_likely_with_its_end(lm, prompts):
    deltas = solve_targets(lm, LAYER, prompts, JOINT.targets)
    for prompt, delta in zip(prompts, deltas, strict=True):
        assert delta.shape == (len(prompt.tokens.answer_ids) + 1, lm.hidden_size)
        before = cross_entropy(lm, prompt, prompt.z)
        assert cross_entropy(lm, prompt, changed(prompt, delta)) < before / 3
    edited = [changed(p, d) for p, d in zip(prompts, deltas, strict=True)]
    answers = predictions(lm, LAYER, prompts, edited)
    assert [tuple(a.tolist()) for a in answers] == [p.tokens.answer_ids for p in prompts]


def test_the_default_settings_raise_the_answers_probability(lm, prompts):
    for prompt, delta in zip(
        prompts, solve_targets(lm, LAYER, prompts, TargetSettings()), strict=True
    ):
        before = cross_entropy(lm, prompt, prompt.z)
        assert cross_entropy(lm, prompt, changed(prompt, delta)) < before


def test_targets_do_not_depend_on_the_batch(lm, prompts):
    few = TargetSettings(steps=8)
    together = solve_targets(lm, LAYER, prompts, few)
    for prompt, delta in zip(prompts, together, strict=True):
        (alone,) = solve_targets(lm, LAYER, [prompt], few)
        assert float((alone - delta).norm()) < 1e-2 * float(alone.norm())


def test_answer_tokens_already_learnt_are_left_alone(lm, prompts):
    for delta in solve_targets(lm, LAYER, prompts[:2], TargetSettings(learnt=1e9)):
        assert not delta.any()


def test_a_penalty_keeps_the_change_small(lm, prompts):
    def size(penalty: float) -> float:
        settings = TargetSettings(steps=20, lr=0.3, penalty=penalty)
        return float(torch.cat(solve_targets(lm, LAYER, prompts[:2], settings)).norm())

    assert size(50.0) < 0.7 * size(0.0)


def test_residuals_and_model_are_left_as_they_are(lm, prompts):
    before = [p.z.clone() for p in prompts]
    solve_targets(lm, LAYER, prompts, TargetSettings(steps=2))
    assert all(torch.equal(p.z, z) for p, z in zip(prompts, before, strict=True))
    assert all(p.grad is None for p in lm.model.parameters())
