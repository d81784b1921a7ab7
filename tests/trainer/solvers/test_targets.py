from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from microedit_trainer.solvers.targets import TargetSettings, solve_targets
from microedit_trainer.stored_residuals import predictions
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, stored_prompts

# The random model never learns to end an answer: its cross-entropy starts at 7.3, falls below this
# in some ten steps, and stays above 5.8.
HALF_LEARNT = 6.5


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


def test_what_is_learnt_never_goes_back_through_the_model(lm, prompts, monkeypatch):
    """And the model is asked again only now and then, whether it still is."""
    runs = []
    upper = type(lm).upper

    def counting(self, z, *args, **kwargs):
        hidden = upper(self, z, *args, **kwargs)
        if hidden.requires_grad:
            runs.append(back := [])
            hidden.register_hook(lambda gradient: back.append(gradient))
        return hidden

    monkeypatch.setattr(type(lm), "upper", counting)
    settings = replace(JOINT.targets, learnt=HALF_LEARNT)
    solve_targets(lm, LAYER, prompts[:2], settings)
    there, back = len(runs), sum(bool(run) for run in runs)
    assert 0 < back < there < settings.steps / 2


def plain_adam(lm, prompt, settings):
    """The definition: one prompt, whole, looked at in every step."""
    z, edited = prompt.z, prompt.edited
    norms = z[edited].norm(dim=-1, keepdim=True)
    delta = torch.zeros_like(z[edited], requires_grad=True)
    rate = settings.lr / z.shape[-1] ** 0.5
    optimizer = torch.optim.Adam([delta], lr=rate, betas=(0.9, 0.99))
    for _ in range(settings.steps):
        hidden = lm.upper(torch.cat([z[: edited.start], z[edited] + delta * norms])[None], LAYER)
        chances = lm.logits(hidden[0, edited]).log_softmax(-1)
        losses = -chances.gather(1, prompt.answer_with_end[:, None])[:, 0]
        loss = (losses * (losses > settings.learnt)).sum()
        optimizer.zero_grad()
        (loss + settings.penalty * (delta**2).sum()).backward()
        optimizer.step()
    return (delta * norms).detach()


@pytest.mark.parametrize("learnt", [0.01, HALF_LEARNT])
def test_targets_are_those_of_the_definition(lm, prompts, learnt):
    settings = replace(JOINT.targets, steps=24, learnt=learnt)
    found = solve_targets(lm, LAYER, prompts[:3], settings)
    for prompt, delta in zip(prompts, found, strict=False):
        wanted = plain_adam(lm, prompt, settings)
        assert float((delta - wanted).norm()) < 1e-2 * float(wanted.norm())
