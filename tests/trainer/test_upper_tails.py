from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from microedit_trainer.language_model import LanguageModel, find_decoder_layers
from microedit_trainer.upper_tails import upper_tails
from tests.tiny_architectures import CONFIGS, build_architecture

LAYER = 0
# Rows of other prompt and answer lengths, longer and shorter than the architectures' windows of 8.
LENGTHS, STARTS = (25, 9, 14, 26), (17, 6, 13, 23)


def language_model(model) -> LanguageModel:
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # as LanguageModel.load does
    model.eval().requires_grad_(False)
    return LanguageModel(model, None, "tiny", Path(), find_decoder_layers(model))


def residuals_of(lm, lengths=LENGTHS):
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (1, n), generator=random) for n in lengths]
    return [lm.lower(i, LAYER)[0] for i in ids]


def changed_tails(lm, residuals, starts, seed=2):
    """z from each start on, changed by about its own size, with a gradient."""
    tails = torch.cat([z[start:] for z, start in zip(residuals, starts, strict=True)])
    noise = torch.randn(tails.shape, generator=torch.Generator().manual_seed(seed))
    scale = tails.norm(dim=-1, keepdim=True) / tails.shape[-1] ** 0.5
    return (tails + noise.to(tails.dtype) * scale).requires_grad_()


def alone(lm, residuals, starts, changed):
    """Each sequence for itself and whole: no padding, no cache."""
    counts = [len(z) - start for z, start in zip(residuals, starts, strict=True)]
    hidden = []
    for z, start, tail in zip(residuals, starts, changed.split(counts), strict=True):
        hidden.append(lm.upper(torch.cat([z[:start], tail])[None], LAYER)[0, start:])
    return torch.cat(hidden)


def lengths_run(lm, call):
    """What `call` returns, and how many positions the last layer ran at."""
    seen = []
    hook = lm.decoder_layers[-1].register_forward_hook(
        lambda module, args, kwargs, output: seen.append(
            (args[0] if args else kwargs["hidden_states"]).shape[1]
        ),
        with_kwargs=True,
    )
    found = call()
    hook.remove()
    return found, seen


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_tails_over_cached_prefixes_are_those_of_whole_sequences(architecture):
    lm = language_model(build_architecture(architecture))
    residuals = residuals_of(lm)
    run = upper_tails(lm, LAYER, residuals, STARTS)
    for seed in (2, 3):  # the second run must not meet what the first added
        changed = changed_tails(lm, residuals, STARTS, seed)
        hidden, lengths = lengths_run(lm, lambda changed=changed: run(changed))
        assert lengths == [8]  # the longest tail, not the longest sequence
        expected = alone(lm, residuals, STARTS, changed)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=2e-5)
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
        found, wanted = (
            torch.autograd.grad((out * weight).sum(), changed)[0] for out in (hidden, expected)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_position_behind_the_model_s_last_is_never_asked_for():
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=4, n_positions=20)
    lm = language_model(GPT2LMHeadModel(config))
    residuals = residuals_of(lm, (20, 20))
    starts = (17, 8)  # the first row's tail is padded up to position 28
    changed = changed_tails(lm, residuals, starts)
    run = upper_tails(lm, LAYER, residuals, starts)
    hidden, lengths = lengths_run(lm, lambda: run(changed))
    assert lengths == [12]
    torch.testing.assert_close(hidden, alone(lm, residuals, starts, changed), rtol=1e-4, atol=2e-5)


def test_a_start_of_zero_runs_whole_sequences():
    lm = language_model(build_architecture("LlamaForCausalLM"))
    residuals = residuals_of(lm)
    starts = (0, 0, 0, 0)
    changed = changed_tails(lm, residuals, starts)
    hidden = upper_tails(lm, LAYER, residuals, starts)(changed)
    torch.testing.assert_close(hidden, alone(lm, residuals, starts, changed), rtol=1e-4, atol=2e-5)


def test_the_last_layer_has_nothing_above_it_to_cache():
    lm = language_model(build_architecture("LlamaForCausalLM"))
    residuals = residuals_of(lm)
    changed = changed_tails(lm, residuals, STARTS)
    hidden = upper_tails(lm, lm.num_layers - 1, residuals, STARTS)(changed)
    torch.testing.assert_close(hidden, lm.model.model.norm(changed))


def no_cache(forward):
    """A forward that takes no cache, as a recurrent model's."""

    def refuses(input_ids=None, inputs_embeds=None, use_cache=False):
        return forward(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False)

    return refuses


def other_positions(forward):
    """A forward that counts positions itself: wrong behind a prefix that is padded."""

    def counts(position_ids=None, **inputs):
        return forward(**inputs)

    return counts


def other_mask(forward):
    """A forward that overlooks the padding of prefixes."""

    def overlooks(attention_mask=None, **inputs):
        return forward(**inputs)

    return overlooks


@pytest.mark.parametrize("does", [no_cache, other_positions, other_mask])
def test_a_forward_that_cannot_do_it_runs_whole_sequences(does, monkeypatch):
    lm = language_model(build_architecture("LlamaForCausalLM"))
    monkeypatch.setattr(lm.model.model, "forward", does(lm.model.model.forward))
    residuals = residuals_of(lm)
    changed = changed_tails(lm, residuals, STARTS)
    run = upper_tails(lm, LAYER, residuals, STARTS)
    hidden, lengths = lengths_run(lm, lambda: run(changed))
    assert lengths == [max(LENGTHS)]
    torch.testing.assert_close(hidden, alone(lm, residuals, STARTS, changed), rtol=1e-4, atol=2e-5)


def test_a_recurrent_model_runs_whole_sequences():
    config = MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, state_size=4, initializer_range=0.3
    )
    lm = language_model(MambaForCausalLM(config))
    residuals = residuals_of(lm)
    changed = changed_tails(lm, residuals, STARTS)
    hidden = upper_tails(lm, LAYER, residuals, STARTS)(changed)
    torch.testing.assert_close(hidden, alone(lm, residuals, STARTS, changed), rtol=1e-4, atol=2e-5)


def test_half_precision_is_near_too():
    lm = language_model(build_architecture("Qwen3ForCausalLM").bfloat16())
    residuals = residuals_of(lm)
    changed = changed_tails(lm, residuals, STARTS)
    run = upper_tails(lm, LAYER, residuals, STARTS)
    hidden, lengths = lengths_run(lm, lambda: run(changed))
    assert lengths == [8]
    expected = alone(lm, residuals, STARTS, changed).float()
    assert float((hidden.float() - expected).norm() / expected.norm()) < 0.02
