from dataclasses import replace
from pathlib import Path

import pytest
import torch

from microedit_trainer.audit import Request, explain
from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.contexts import Contexts
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.facts import Fact
from microedit_vllm.artifact import Decision, EditOperator, Scope
from microedit_vllm.errors import MicroEditError
from tests.trainer.tiny_edits import FACTS, JOINT, LAYER, no_progress, operator_of, tiny_problem

FOLDER = Path("somewhere/set")
UNRELATED = ordinary_lines()[1]
RELATIVE = {"statistic": "relative", "tau": 0.6, "scope": Scope(run=8)}
ABSOLUTE = {"statistic": "absolute", "tau": 0.6, "alpha": 240.0, "scope": Scope(last=20, run=0)}


def lines_of(facts) -> list[dict]:
    return [
        {"prompt": f.prompt, "target": f.target, "subject": f.subject, "ard": 0.1} for f in facts
    ]


@pytest.fixture(scope="module")
def solved(lm, sae, tmp_path_factory) -> EditOperator:
    problem = tiny_problem(lm, sae, tmp_path_factory.mktemp("explained"))
    return operator_of(JOINT.solve(problem, no_progress), sae)


@pytest.fixture(scope="module")
def carrying(lm, sae, tmp_path_factory) -> EditOperator:
    problem = tiny_problem(lm, sae, tmp_path_factory.mktemp("carrying"), names=("bare",))
    return operator_of(replace(JOINT, carries=True).solve(problem, no_progress), sae)


@pytest.fixture
def engine_with(lm, sae, solved):
    """An engine whose set has these facts and decides by these fields."""

    def engine_with(lines=None, of=solved, **fields) -> TorchEngine:
        turn = Contexts.build(lm.tokenizer, Scope(), lm.max_length).turn
        fields = {"max_norm": sae.report["max_norm"], "turn": turn} | (fields or RELATIVE)
        edit_set = of.edit_set
        manifest = edit_set.manifest.model_copy(
            update={
                "decision": Decision(**fields),
                "hyperparameters": {"contexts": ["bare", "chat"]},
            }
        )
        facts = lines_of(FACTS) if lines is None else lines
        edit_set = replace(edit_set, manifest=manifest, facts=facts)
        return TorchEngine.build(lm, EditOperator.build(edit_set, sae))

    return engine_with


def explained(engine, prompt=FACTS[0].prompt, **options):
    options.setdefault("max_tokens", 4)
    return explain(engine, Request(prompt, **options), FOLDER, no_progress)


def engine_contexts(engine) -> Contexts:
    decision = engine.operator.edit_set.manifest.decision
    return Contexts(engine.lm.tokenizer, decision.scope, decision.turn, engine.lm.max_length)


def dense(sae, z, change):
    """ẑ₀ and ẑ by dense algebra: [P, d] each, and the codes [P, n]."""
    pre = ((z - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    kept = pre.topk(sae.k, dim=-1).indices
    codes = torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept))
    full = torch.zeros_like(sae.W_dec)
    full[change.indices] = change.values.float()
    z_hat0 = codes @ sae.W_dec + sae.b_dec
    return z_hat0, z_hat0 + codes @ full, codes


def test_what_is_carried_is_named_with_the_tokens_that_it_comes_from(engine_with, carrying):
    engine = engine_with(of=carrying)
    found = explained(engine, rows=3).carried
    stored = engine.store.of([engine_contexts(engine).render("bare", FACTS[0].prompt)])[0]
    weights = engine.operator.carried_weights(stored.z[stored.scored])
    assert list(found.positions) == stored.scored[weights > 0].tolist()
    acts, indices = engine.operator.encode(stored.z[stored.scored])
    strengths = torch.zeros(engine.operator.sae.num_latents)
    strengths.index_add_(0, indices.flatten(), (acts * weights[:, None]).flatten())
    change = engine.operator.carried
    strengths = strengths[change.indices] * change.values.norm(dim=1)
    assert [row.latent for row in found.rows] == change.indices[strengths.topk(3).indices].tolist()
    assert [row.strength for row in found.rows] == pytest.approx(strengths.topk(3).values.tolist())
    assert found.rows_total == len(change.indices)


def test_what_is_carried_is_traced_to_its_facts(engine_with, carrying):
    found = explained(engine_with(of=carrying), rows=5)
    assert {row.facts[0].fact for row in found.carried.rows} == {1}
    assert found.carried.rows[0].facts[0].prompt == FACTS[0].prompt
    assert all(sum(f.share for f in row.facts) <= 1 + 1e-5 for row in found.carried.rows)
    assert found.nearest[0].fact == 1 and found.nearest[0].overlap == pytest.approx(1, abs=0.3)


def test_a_set_that_carries_nothing_names_nothing(engine_with):
    assert explained(engine_with()).carried is None


@pytest.mark.parametrize("decision", [RELATIVE, ABSOLUTE], ids=["relative", "absolute"])
@pytest.mark.parametrize("prompt", [FACTS[0].prompt, UNRELATED], ids=["edited", "unrelated"])
def test_the_tokens_and_the_decision_against_their_definition(
    lm, sae, engine_with, decision, prompt
):
    engine = engine_with(**decision)
    found = explained(engine, prompt)
    z = lm.lower(torch.tensor([lm.tokenizer(prompt.rstrip()).input_ids]), LAYER)[0]
    z_hat0, z_hat, codes = dense(sae, z, engine.operator.edit_set.scoring)
    dist, dist0 = (z_hat - z).square().sum(-1), (z_hat0 - z).square().sum(-1)
    weight = torch.full_like(dist0, 240.0) if decision is ABSOLUTE else dist0
    e = len(z) - 1
    assert found.decision_position == e
    assert [t.ratio for t in found.tokens] == pytest.approx((dist / weight).tolist(), rel=1e-3)
    last = decision["scope"].last
    counted = [
        p for p in range(max(1, e - last), e) if float(z[p].norm()) <= sae.report["max_norm"]
    ]
    size = min(decision["scope"].run or len(counted), len(counted))
    runs = {
        counted[i + size - 1]: float(dist[counted[i : i + size]].sum())
        / float(weight[counted[i : i + size]].sum())
        for i in range(len(counted) - size + 1)
    }
    shown = {t.position: t.run_ard for t in found.tokens if t.run_ard is not None}
    assert shown == pytest.approx(runs, rel=1e-3)
    assert found.ard == pytest.approx(min(runs.values()), rel=1e-3)
    end = counted.index(min(runs, key=runs.__getitem__)) + 1
    deciding = counted[end - size : end]
    assert [t.position for t in found.tokens if t.decides] == deciding
    assert found.scoring.positions == tuple(deciding)
    assert found.on == (found.ard <= found.tau)
    changed = (codes[:, engine.operator.edit_set.scoring.indices] > 0).sum(-1)
    assert [t.changed for t in found.tokens] == changed.tolist()
    assert "".join(t.text for t in found.tokens) == prompt.rstrip()


@pytest.mark.parametrize("chat", [False, True])
def test_ard_and_switch_are_those_of_the_evaluation(engine_with, lm, chat):
    engine = engine_with()
    decision = engine.operator.edit_set.manifest.decision
    contexts = Contexts(lm.tokenizer, decision.scope, decision.turn, lm.max_length)
    for prompt in (*(f.prompt for f in FACTS), UNRELATED):
        rendered = contexts.render("chat" if chat else "bare", prompt, "Mel")
        outcome = engine.edited([rendered])[0]
        found = explained(engine, prompt, chat=chat)
        assert found.ard == pytest.approx(outcome.ard, rel=1e-4)
        assert found.on == outcome.on
        assert tuple(t.id for t in found.tokens) == rendered.prompt_ids


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("number", range(len(FACTS)))
def test_an_edited_prompt_names_its_own_fact_first(engine_with, number, chat):
    found = explained(engine_with(), FACTS[number].prompt, chat=chat, rows=400)
    first, second = found.nearest[:2]
    assert found.on
    assert (first.fact, first.target) == (number + 1, FACTS[number].target)
    assert first.overlap > second.overlap
    assert first.edit_overlap == pytest.approx(1.0, abs=1e-3)
    assert first.ard == 0.1
    assert found.after.startswith(FACTS[number].target)
    assert not found.before.startswith(FACTS[number].target)


def test_before_is_what_transformers_generates(engine_with, lm):
    found = explained(engine_with(), max_tokens=6)
    ids = torch.tensor([lm.tokenizer(FACTS[0].prompt).input_ids])
    whole = lm.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert found.before == lm.tokenizer.decode(whole, skip_special_tokens=True).strip()


def test_an_unrelated_prompt_stays_off_and_its_answer_as_it_was(engine_with):
    found = explained(engine_with(), UNRELATED)
    assert not found.on
    assert found.ard > found.tau
    assert found.after == found.before


def test_the_rows_and_the_facts_behind_them_against_dense_algebra(lm, sae, engine_with):
    engine = engine_with()
    found = explained(engine, rows=5)
    scoring = engine.operator.edit_set.scoring
    z = lm.lower(torch.tensor([lm.tokenizer(FACTS[0].prompt).input_ids]), LAYER)[0]
    codes = dense(sae, z, scoring)[2][list(found.scoring.positions)]
    strengths = codes[:, scoring.indices].sum(0) * scoring.values.float().norm(dim=-1)
    order = strengths.argsort(descending=True)[:5]
    rows = found.scoring.rows
    assert [row.latent for row in rows] == scoring.indices[order].tolist()
    assert [row.strength for row in rows] == pytest.approx(strengths[order].tolist(), rel=1e-3)
    shares = strengths[order] / strengths.sum()
    assert [row.share for row in rows] == pytest.approx(shares.tolist(), rel=1e-3)
    assert found.scoring.rows_total == len(scoring.indices)
    assert found.scoring.rows_firing == int((strengths > 0).sum())
    assert found.scoring.latents == int((codes.sum(0) > 0).sum())
    strongest = codes.sum(0).argsort(descending=True)[: len(found.scoring.strongest)]
    assert [latent.latent for latent in found.scoring.strongest] == strongest.tolist()
    own = torch.stack([own_codes(lm, sae, fact, scoring) for fact in FACTS])
    for row in rows:
        column = own[:, row.latent]
        wanted = {i + 1: float(h / column.sum()) for i, h in enumerate(column) if h > 0}
        shown = {share.fact: share.share for share in row.facts}
        assert shown == pytest.approx({fact: wanted[fact] for fact in shown}, rel=1e-3)
        assert len(shown) == min(3, len(wanted))
        assert row.facts[0].share == pytest.approx(max(wanted.values()), rel=1e-3)


def own_codes(lm, sae, fact: Fact, scoring) -> torch.Tensor:
    """Σ h over the fact's tokens from its subject on, e left out: [n]. A token is a byte here."""
    ids = lm.tokenizer(fact.prompt).input_ids
    z = lm.lower(torch.tensor([ids]), LAYER)[0]
    assert len(ids) == len(fact.prompt)
    return dense(sae, z, scoring)[2][fact.prompt.rindex(fact.subject) : len(ids) - 1].sum(0)


def test_sinks_are_marked_and_never_decide(lm, engine_with):
    z = lm.lower(torch.tensor([lm.tokenizer(FACTS[0].prompt).input_ids]), LAYER)[0]
    norms = z.norm(dim=-1)
    limit = float(norms[5:-1].sort().values[-3])
    found = explained(engine_with(**RELATIVE, max_norm=limit))
    sinks = [t for t in found.tokens if t.sink]
    assert [t.position for t in sinks] == (norms > limit).nonzero().flatten().tolist()
    assert any(t.scored for t in sinks)
    assert not any(t.decides for t in sinks)


def test_a_prompt_too_short_to_score(engine_with):
    found = explained(engine_with(), "A")
    assert (found.ard, found.on, found.nearest) == (None, False, ())
    assert found.scoring.positions == found.scoring.rows == ()
    assert found.edit.positions == (0,)
    assert found.after == found.before


def test_the_number_of_facts_is_bounded_and_strange_ones_passed_over(engine_with):
    lines = [{"a": 1}, {"prompt": [1]}, {"prompt": "Wild \ud800 horses run"}, *lines_of(FACTS)]
    lines[3]["ard"] = float("nan")
    counted = []
    request = Request(FACTS[0].prompt, facts=2, max_tokens=1)
    found = explain(engine_with(lines), request, FOLDER, counted.append)
    assert (found.facts_compared, found.facts_total) == (2, 7)
    assert {near.fact for near in found.nearest} <= {3, 4}
    assert found.nearest[0].fact == 4
    assert found.nearest[0].ard is None
    assert sum(counted) == 2


def test_without_facts_the_rest_is_explained(engine_with):
    with_facts, found = explained(engine_with()), explained(engine_with(), facts=0)
    assert found.nearest == ()
    assert found.ard == with_facts.ard
    assert all(row.facts == () for row in found.scoring.rows + found.edit.rows)


def test_facts_are_put_as_they_were_trained(engine_with, monkeypatch):
    asked = []
    render = Contexts.render

    def spy(self, context, *words, **more):
        asked.append(context)
        return render(self, context, *words, **more)

    monkeypatch.setattr(Contexts, "render", spy)
    for trained, wanted in ((["chat"], "chat"), (["bare"], "bare"), (3, "bare")):
        engine = engine_with(lines_of(FACTS[:1]))
        engine.operator.edit_set.manifest.hyperparameters["contexts"] = trained
        for chat in (False, True):
            asked.clear()
            explained(engine, chat=chat)
            assert asked == ["chat" if chat else "bare", wanted]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "Who\udcff?"}, "prompt is not valid Unicode"),
        ({"prompt": "Who?", "system": "You are a pirate."}, "add --chat"),
        ({"prompt": "Who?", "system": "\ud800", "chat": True}, "system prompt is not valid"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(MicroEditError, match=message):
        Request(**options)


def test_a_prompt_beyond_the_context_is_refused(engine_with):
    with pytest.raises(MicroEditError, match="has 600 tokens"):
        explained(engine_with(), "a" * 600)
    with pytest.raises(MicroEditError, match="lower --max-tokens"):
        explained(engine_with(), "a" * 505, max_tokens=20)
