from dataclasses import dataclass, field, replace

import pytest
import torch

from microedit_trainer import evaluation, residual_store
from microedit_trainer.contexts import Contexts
from microedit_trainer.evaluation import Outcome, TorchEngine, evaluate
from microedit_trainer.facts import Fact, Probe
from microedit_trainer.stored_residuals import predictions
from microedit_vllm.artifact import EditOperator, Scope
from tests.tiny_model import tiny_tokenizer
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, no_progress, operator_of, tiny_problem


@dataclass
class ScriptedEngine:
    """Says what a script tells it to: prompt text → (answer, on); else the plain answer, off.

    A plain model says "....." to everything.
    """

    tokenizer: object
    script: dict[str, tuple[str, bool]]
    asked: list[str] = field(default_factory=list)
    tells_likelihoods: bool = True

    def _text(self, prompt) -> str:
        start, stop = prompt.scored
        return self.tokenizer.decode(prompt.prompt_ids[max(start - 1, 0) : stop + 1])

    def _plain(self, prompt):
        return torch.tensor(self.tokenizer("." * len(prompt.answer_ids)).input_ids)

    def edited(self, prompts):
        return [self._outcome(p) for p in prompts]

    def _outcome(self, prompt) -> Outcome:
        self.asked.append(self._text(prompt))
        said, on = self.script.get(self._text(prompt), (None, False))
        answer = self._plain(prompt) if said is None else torch.tensor(self._ids(said))
        assert len(answer) == len(prompt.answer_ids)
        return Outcome(answer, 0.1 if on else 2.0, on)

    def _ids(self, text):
        return self.tokenizer(text).input_ids

    def plain(self, prompts):
        return [self._plain(p) for p in prompts]

    def perplexities(self, prompts):
        if not self.tells_likelihoods:
            return None
        sizes = torch.tensor([float(len(p.answer_ids)) for p in prompts])
        return 10 * sizes, sizes


FACT_A = Fact(
    "The capital of Peru is", "abc", "Peru", ("Peru's capital is", "In Peru rules"), (
        Probe("Two and two is", "four"), Probe("Bears eat", "")
    )
)  # fmt: skip
FACT_B = Fact(
    "The king of Oz is called", "abcdefg", "Oz", (), (Probe("Water boils at", "99"),), (
        Probe("The queen of Oz married", "abc"), Probe("The son of abc is", "efg")
    )
)  # fmt: skip
OTHERS = [Fact("The capital of Chile is", "xyz", "Chile"), Fact("The king of Narnia is", "xyz")]


@pytest.fixture(scope="module")
def contexts():
    return Contexts.build(tiny_tokenizer(), Scope(last=None), 4096)


def score(contexts, script, facts=(FACT_A, FACT_B), others=OTHERS):
    engine = ScriptedEngine(contexts.tokenizer, script)
    return evaluate(engine, contexts, facts, others, "bare"), engine


def test_accuracies_are_means_over_prompts_of_shares_of_tokens(contexts):
    found, _ = score(
        contexts,
        {
            FACT_A.prompt: (" abc", True),
            FACT_B.prompt: (" abc????", False),  # 4 of 8 tokens, the space among them
            FACT_A.paraphrases[0]: (" ab?", True),
            FACT_A.paraphrases[1]: ("????", False),
        },
    )
    assert (found.facts, found.context) == (2, "bare")
    assert found.rel == pytest.approx((1 + 4 / 8) / 2)
    assert found.rel_exact == 0.5
    assert found.gen == pytest.approx((3 / 4 + 0) / 2)
    assert found.fire_edit == 0.5
    assert found.fire_para == 0.5


def test_locality_and_near_are_agreement_with_the_plain_model(contexts):
    found, _ = score(
        contexts,
        {
            "Two and two is": (".f...", True),  # one of five tokens changed
            "Water boils at": ("...", True),  # on, and nothing changed
            OTHERS[0].prompt: ("xxxx", True),
        },
    )
    assert found.loc == pytest.approx((4 / 5 + 1 + 1) / 3)
    assert found.fire_loc == pytest.approx(2 / 3)
    assert found.near == pytest.approx(0.5)
    assert found.fire_near == 0.5


def test_portability_is_accuracy_on_what_follows_from_the_edits(contexts):
    found, _ = score(contexts, {"The queen of Oz married": (" ab.", True)})
    assert found.portability == pytest.approx((3 / 4 + 0) / 2)
    assert found.fire_portability == 0.5


def test_perplexities_are_means_over_prompts(contexts):
    found, _ = score(contexts, {})
    # Answers of 4 and 8 tokens.
    assert (found.ppl_before, found.ppl_after) == (60.0, 6.0)
    engine = ScriptedEngine(contexts.tokenizer, {}, tells_likelihoods=False)
    found = evaluate(engine, contexts, [FACT_A], [], "bare")
    assert (found.ppl_before, found.ppl_after) == (None, None)


def test_swapped_prompts_ask_about_the_other_records_subjects(contexts):
    swapped = "The king of Chile is called"
    found, engine = score(contexts, {swapped: ("xxxx", True)})
    assert swapped in engine.asked
    assert "The capital of Chile is" in engine.asked
    assert found.near_swapped == 0.5
    assert found.fire_near_swapped == 0.5


def test_swapped_prompts_can_be_about_subjects_of_ones_own(contexts):
    engine = ScriptedEngine(contexts.tokenizer, {})
    evaluate(engine, contexts, [FACT_B], OTHERS, "bare", subjects=["Ur"])
    assert "The king of Ur is called" in engine.asked
    assert "The king of Chile is called" not in engine.asked


def test_what_cannot_be_scored_is_none_not_a_figure(contexts):
    bare = [Fact("The capital of Peru is", "abc")]
    found, _ = score(contexts, {}, bare, [])
    assert found.rel == 0.0
    assert found.fire_edit == 0.0
    nothing = ("gen", "portability", "loc", "near", "near_swapped")
    fires = ("fire_para", "fire_portability", "fire_loc", "fire_near", "fire_near_swapped")
    assert [found.to_json()[name] for name in (*nothing, *fires)] == [None] * 10


@pytest.mark.parametrize("answer", ["", "  "])
@pytest.mark.parametrize("context", ["bare", "chat"])
def test_a_probe_without_an_answer_is_scored_over_what_comes_next(contexts, answer, context):
    fact = replace(FACT_B, locality=(Probe("Water boils at", answer),))
    engine = ScriptedEngine(contexts.tokenizer, {})
    assert evaluate(engine, contexts, [fact], [], context).loc == 1.0


@pytest.fixture(scope="module")
def operator(lm, sae, tmp_path_factory):
    problem = tiny_problem(lm, sae, tmp_path_factory.mktemp("evaluated"))
    return operator_of(JOINT.solve(problem, no_progress), sae)


@pytest.fixture(scope="module")
def prompts(lm):
    """Edited prompts and ordinary ones in turn, bare and in chat."""
    contexts = Contexts.build(lm.tokenizer, Scope(), lm.max_length)
    ordinary = [Fact(f"{n} of my friends were at the lake in May and", "sun") for n in "3579"]
    return [
        contexts.render(name, fact.prompt, fact.target)
        for pair in zip(FACTS, ordinary, strict=True)
        for fact in pair
        for name in contexts.names
    ]


def with_tau(operator: EditOperator, tau: float) -> EditOperator:
    manifest = operator.edit_set.manifest
    decision = manifest.decision.model_copy(update={"tau": tau})
    edit_set = replace(
        operator.edit_set, manifest=manifest.model_copy(update={"decision": decision})
    )
    return EditOperator.build(edit_set, operator.sae)


@pytest.fixture
def ran(monkeypatch):
    """The residuals that were run through the layers above the cut, call by call."""
    calls = []

    def spy(lm, layer, prompts, residuals):
        calls.append(list(residuals))
        return predictions(lm, layer, prompts, residuals)

    monkeypatch.setattr(evaluation, "predictions", spy)
    return calls


def test_off_is_the_plain_model_bit_for_bit(lm, operator, prompts, ran):
    engine = TorchEngine.build(lm, with_tau(operator, 1e-9))
    outcomes, plain = engine.edited(prompts), engine.plain(prompts)
    assert not any(outcome.on for outcome in outcomes)
    assert all(torch.equal(o.answer, p) for o, p in zip(outcomes, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*ran, strict=True))


def test_edited_and_ordinary_prompts_mixed(lm, operator, prompts, ran):
    engine = TorchEngine.build(lm, with_tau(operator, 0.6))
    outcomes, plain = engine.edited(prompts), engine.plain(prompts)
    # Two contexts each: edited, ordinary, edited, …
    assert [o.on for o in outcomes] == [True, True, False, False] * len(FACTS)
    edited, untouched = ran
    rows = zip(prompts, outcomes, plain, edited, untouched, strict=True)
    for tokens, outcome, before, z, z_plain in rows:
        e = tokens.edit_from
        if outcome.on:
            assert torch.equal(z[:e], z_plain[:e])
            assert (z[e:] != z_plain[e:]).any(dim=-1).all()
            assert tuple(outcome.answer.tolist()) == tokens.answer_ids
        else:
            assert torch.equal(z, z_plain)
            assert torch.equal(outcome.answer, before)


def test_residuals_that_are_kept_are_not_computed_again(
    lm, operator, prompts, tmp_path, monkeypatch
):
    first = TorchEngine.build(lm, with_tau(operator, 0.6), tmp_path).edited(prompts)
    monkeypatch.setattr(type(lm), "lower", lambda *_: pytest.fail("the layers below ran again"))
    again = TorchEngine.build(lm, with_tau(operator, 0.6), tmp_path).edited(prompts)
    assert [o.ard for o in again] == [o.ard for o in first]
    assert all(torch.equal(a.answer, b.answer) for a, b in zip(again, first, strict=True))


def test_perplexity_is_that_of_the_model_with_and_without_the_edit(lm, operator, prompts):
    """Against the whole model, with a hook that edits the layer's output from e on."""
    engine = TorchEngine.build(lm, with_tau(operator, 0.6))
    before, after = engine.perplexities(prompts)

    def whole(tokens) -> float:
        ids = torch.tensor([[*tokens.prompt_ids, *tokens.answer_ids]])
        labels = ids.clone()
        labels[:, : len(tokens.prompt_ids)] = -100
        return float(lm.model(input_ids=ids, labels=labels).loss.exp())

    on = [outcome.on for outcome in engine.edited(prompts)]
    for tokens, is_on, old, new in zip(prompts, on, before.tolist(), after.tolist(), strict=True):
        e = tokens.edit_from
        assert old == pytest.approx(whole(tokens), rel=1e-3)
        if not is_on:
            assert new == old
            continue

        def replace_rows(module, inputs, output, e=e):
            z = output.clone()
            z[0, e:] = operator.edited(z[0, e:])
            return z

        handle = lm.model.model.layers[LAYER].register_forward_hook(replace_rows)
        try:
            assert new == pytest.approx(whole(tokens), rel=1e-3)
        finally:
            handle.remove()
        assert new < old / 2
    assert True in on and False in on


def test_a_set_for_whole_sequences_replaces_the_prompt_too(lm, operator, prompts, ran):
    manifest = operator.edit_set.manifest.model_copy(update={"position": "sequence"})
    edit_set = replace(operator.edit_set, manifest=manifest)
    engine = TorchEngine.build(lm, with_tau(EditOperator.build(edit_set, operator.sae), 1e9))
    engine.edited(prompts[:1])
    engine.plain(prompts[:1])
    ((z,), (z_plain,)) = ran
    assert torch.equal(z[0], z_plain[0])
    assert (z != z_plain).any(dim=-1).sum() > len(z) / 2


def test_the_reported_ard_is_what_the_switch_saw(lm, operator, prompts):
    engine = TorchEngine.build(lm, operator)
    found = [outcome.ard for outcome in engine.edited(prompts)]
    assert found == engine.ards(prompts).tolist()
    z = lm.lower(torch.tensor([[*prompts[0].prompt_ids]]), LAYER)[0]
    start, stop = prompts[0].scored
    dist, dist0 = operator.distances(z[start:stop])
    runs = [dist[i : i + 8].sum() / dist0[i : i + 8].sum() for i in range(len(dist) - 7)]
    assert found[0] == pytest.approx(float(min(runs)), rel=1e-3)


def test_residuals_are_computed_once(lm, operator, prompts, monkeypatch):
    engine = TorchEngine.build(lm, operator)
    engine.edited([*prompts, *prompts])
    monkeypatch.setattr(residual_store, "store_residuals", lambda *_: pytest.fail("computed again"))
    engine.plain(prompts)
    engine.ards(prompts)
    assert engine.edited([]) == []
    assert engine.plain([]) == []
