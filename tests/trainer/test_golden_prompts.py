from dataclasses import replace

import pytest
import torch

from microedit_trainer import golden_prompts as module
from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.contexts import Contexts
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.golden_prompts import golden_prompts, read_around
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact import EditOperator, Scope
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, no_progress, operator_of, tiny_problem


@pytest.fixture(scope="module")
def operator(lm, sae, tmp_path_factory) -> EditOperator:
    problem = tiny_problem(lm, sae, tmp_path_factory.mktemp("golden"))
    return operator_of(JOINT.solve(problem, no_progress), sae, tau=0.8)


@pytest.fixture
def engine(lm, operator) -> TorchEngine:
    return TorchEngine.build(lm, operator)


@pytest.fixture(scope="module")
def contexts(lm) -> Contexts:
    return Contexts.build(lm.tokenizer, Scope(run=8), lm.max_length)


@pytest.fixture(scope="module")
def own(contexts):
    return [contexts.render("bare", fact.prompt) for fact in FACTS]


def test_every_place_around_the_layer_is_read(lm):
    """Against transformers' own hidden_states, and the layer's own sums."""
    ids = lm.tokenizer("Who sailed where?").input_ids
    found = read_around(lm, LAYER, ids)
    states = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert torch.equal(found["right"], states[LAYER + 1][0])
    assert torch.equal(found["layer_before"], states[LAYER][0])
    assert found["layer_after"].shape == found["right"].shape
    mlp = lm.decoder_layers[LAYER].mlp
    heard = []
    handle = mlp.register_forward_hook(lambda module, args, output: heard.append(output[0]))
    lm.lower(torch.tensor([ids]), LAYER)
    handle.remove()
    assert torch.equal(found["hidden_states_alone"], heard[0])
    total = found["hidden_states_alone"] + found["residual_alone"]
    torch.testing.assert_close(total, found["right"])


@pytest.mark.parametrize(("layer", "absent"), [(0, "layer_before"), (2, "layer_after")])
def test_a_place_that_the_model_does_not_have_is_left_out(lm, layer, absent):
    found = read_around(lm, layer, [5, 6, 7])
    everywhere = {"layer_before", "right", "layer_after", "hidden_states_alone", "residual_alone"}
    assert set(found) == everywhere - {absent}


def test_the_right_ard_and_those_of_the_misreadings(lm, engine, own):
    found = golden_prompts(engine, own, on=True, count=2)
    assert len(found) == 2
    for prompt, tokens in zip(found, own, strict=False):
        assert prompt.token_ids == tokens.prompt_ids
        assert prompt.edit_from == tokens.edit_from
        assert prompt.on
        assert prompt.ard == pytest.approx(float(engine.ards([tokens])), rel=1e-3)
        for name, layer in (("layer_before", LAYER - 1), ("layer_after", LAYER + 1)):
            z = lm.lower(torch.tensor([tokens.prompt_ids]), layer)[0]
            sinks = z.norm(dim=-1) > engine.operator.edit_set.manifest.decision.max_norm
            wanted = engine.ard(StoredPrompt(tokens, z, sinks))
            assert prompt.misread[name] == pytest.approx(float(wanted), rel=1e-3)
        assert set(prompt.misread) >= {"hidden_states_alone", "residual_alone"}


def test_answers_are_what_greedy_generation_gives(lm, engine, own):
    for prompt, fact in zip(golden_prompts(engine, own, on=True, count=4), FACTS, strict=False):
        edited = lm.tokenizer.decode(prompt.edited)
        assert prompt.edited
        assert f" {fact.target}".startswith(edited) or edited.startswith(f" {fact.target}")
        ids = torch.tensor([prompt.token_ids])
        whole = lm.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert prompt.plain == tuple(whole.tolist())[: len(prompt.plain)]


def test_what_stays_off_has_one_answer(engine, contexts):
    ordinary = [contexts.render("bare", line) for line in ordinary_lines()[1:20:2]]
    for prompt in golden_prompts(engine, ordinary, on=False, count=3):
        assert not prompt.on
        assert prompt.edited == prompt.plain


def test_decisions_near_tau_are_left_out(lm, engine, own, monkeypatch):
    monkeypatch.setattr(module, "_is_steady", lambda engine, prompt: True)
    ards = engine.ards(own)
    manifest = engine.operator.edit_set.manifest

    def found_under(tau: float, on: bool) -> int:
        decision = manifest.decision.model_copy(update={"tau": tau})
        edit_set = replace(
            engine.operator.edit_set, manifest=manifest.model_copy(update={"decision": decision})
        )
        operator = EditOperator.build(edit_set, engine.operator.sae)
        return len(golden_prompts(TorchEngine.build(lm, operator), own, on, count=10))

    largest, least = float(ards.max()), float(ards.min())
    assert found_under(largest * 1.3, on=True) == len(own)
    assert found_under(largest * 1.05, on=True) < len(own)
    assert found_under(least * 0.95, on=False) < len(own)
    assert found_under(least * 0.7, on=False) == len(own)


def with_tied_latents(engine, stored, position: int, apart: float) -> TorchEngine:
    """The SAE with the bias of the latent next after the Top-k such that it leads by `apart`."""
    sae = engine.operator.sae
    z = stored.z[position]
    pre_acts = sae.W_enc @ (z - sae.b_dec) + sae.b_enc
    order = pre_acts.argsort(descending=True)
    last, after = order[sae.k - 1], order[sae.k]
    b_enc = sae.b_enc.clone()
    b_enc[after] += pre_acts[last] - pre_acts[after] + apart
    operator = EditOperator.build(engine.operator.edit_set, replace(sae, b_enc=b_enc))
    return TorchEngine.build(engine.lm, operator)


def test_a_prompt_whose_ard_hangs_on_a_tie_of_latents_is_left_out(engine, own):
    """An engine that rounds otherwise has the other latent among its Top-k, and a far other ARD."""
    tied = 0
    for tokens, stored in zip(own, engine.store.of(own), strict=True):
        for position in stored.identifying.tolist():
            sides = [with_tied_latents(engine, stored, position, by) for by in (-0.01, 0.01)]
            below, above = (float(side.ards([tokens])) for side in sides)
            if abs(below / above - 1) < 0.1 or max(below, above) > 0.6:
                continue
            tied += 1
            between = with_tied_latents(engine, stored, position, 1e-7)
            assert golden_prompts(between, [tokens], on=True, count=1) == []
    assert tied


def test_tokens_that_rounding_could_turn_over_are_left_out(engine, own, monkeypatch):
    monkeypatch.setattr(module, "CLEAR_TOKEN", {torch.float32: 1e9})
    assert [p.edited for p in golden_prompts(engine, own, on=True, count=2)] == [(), ()]


def test_no_prompts_no_golden_prompts(engine):
    assert golden_prompts(engine, [], on=True, count=3) == []


def test_relative_ard_near_one_is_clear_nearer_to_tau_than_any_other():
    ards = torch.tensor([1.0, 1.0, 0.2, 2.0])
    clear = ards >= torch.tensor([0.97, 0.99, 0.5, 1.9]) * (1 + module._unclear(ards, True))
    assert clear.tolist() == [True, False, False, False]
    assert module._unclear(ards, True)[2] == pytest.approx(0.14)
    assert module._unclear(ards, False).tolist() == pytest.approx([module.CLEAR_DECISION] * 4)
