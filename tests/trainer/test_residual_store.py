from dataclasses import replace

import pytest
import torch

from microedit_trainer import residual_store
from microedit_trainer.contexts import Contexts
from microedit_trainer.residual_store import ResidualStore
from microedit_trainer.stored_residuals import store_residuals
from microedit_vllm.artifact import Scope
from tests.trainer.tiny_edits import FACTS, LAYER

LIMIT = 20.0
FAR = 1e9  # no token is a sink


@pytest.fixture(scope="module")
def prompts(lm):
    contexts = Contexts.build(lm.tokenizer, Scope(), lm.max_length)
    return [contexts.render(c, f.prompt, f.target) for f in FACTS for c in contexts.names]


@pytest.fixture
def ran(monkeypatch):
    """The prompts that went through the layers, batch by batch."""
    batches = []

    def counting(lm, layer, batch, max_norm):
        batches.append(list(batch))
        return store_residuals(lm, layer, batch, max_norm)

    monkeypatch.setattr(residual_store, "store_residuals", counting)
    return batches


def same(found, wanted) -> bool:
    return [p.tokens for p in found] == [p.tokens for p in wanted] and all(
        torch.allclose(f.z, w.z, atol=1e-4) and torch.equal(f.is_sink, w.is_sink)
        for f, w in zip(found, wanted, strict=True)
    )


def test_each_prompt_runs_once_and_comes_back_in_its_place(lm, prompts, ran):
    store = ResidualStore(lm, LAYER, LIMIT)
    wanted = store_residuals(lm, LAYER, [*prompts, prompts[0]], LIMIT)
    assert same(store.of([*prompts, prompts[0]]), wanted)
    assert same(store.of(prompts[3:5]), wanted[3:5])
    assert sorted(map(hash, ran[0])) == sorted(map(hash, prompts)) and len(ran) == 1


def test_memory_is_bounded_and_what_was_dropped_is_run_again(lm, prompts, ran):
    sizes = [p.z.nbytes for p in store_residuals(lm, LAYER, prompts, LIMIT)]
    room = sizes[-1] + sizes[-2]
    store = ResidualStore(lm, LAYER, LIMIT, room=room)
    for prompt in prompts:
        store.of([prompt])
    assert len(ran) == len(prompts)
    store.of(prompts[-2:])
    assert len(ran) == len(prompts)
    store.of(prompts[:1])
    assert ran[-1] == prompts[:1]
    held = sum(stored.z.nbytes for stored in store._held.values())
    assert held <= room


def test_a_folder_spares_later_runs_the_layers(lm, prompts, ran, tmp_path):
    first = ResidualStore(lm, LAYER, LIMIT, tmp_path).of(prompts[:5])
    found = ResidualStore(lm, LAYER, LIMIT, tmp_path).of(prompts)
    assert same(found[:5], first)
    assert all(torch.equal(f.z, w.z) for f, w in zip(found, first, strict=False))
    assert [sorted(map(hash, batch)) for batch in ran] == [
        sorted(map(hash, prompts[:5])),
        sorted(map(hash, prompts[5:])),
    ]


def test_sinks_are_those_of_the_run_and_not_of_the_folder(lm, prompts, tmp_path):
    ResidualStore(lm, LAYER, 1e9, tmp_path).of(prompts[:1])
    (found,) = ResidualStore(lm, LAYER, 0.0, tmp_path).of(prompts[:1])
    assert bool(found.is_sink.all())


def test_another_layer_or_answer_is_not_taken(lm, prompts, ran, tmp_path):
    ResidualStore(lm, LAYER, LIMIT, tmp_path).of(prompts[:1])
    ResidualStore(lm, LAYER - 1, LIMIT, tmp_path).of(prompts[:1])
    other = replace(prompts[0], answer_ids=(*prompts[0].answer_ids[:-1], 9))
    ResidualStore(lm, LAYER, LIMIT, tmp_path).of([other])
    assert len(ran) == 3


def test_a_stopped_run_keeps_what_it_had(lm, prompts, ran, tmp_path, monkeypatch):
    monkeypatch.setattr(residual_store, "TOGETHER", 2)

    def stop(done, total):
        assert total == len(prompts)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ResidualStore(lm, LAYER, LIMIT, tmp_path).of(prompts, stop)
    ResidualStore(lm, LAYER, LIMIT, tmp_path).of(prompts)
    assert [len(batch) for batch in ran] == [2] * (len(prompts) // 2)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b"\xff" * len(b)])
def test_a_damaged_file_counts_as_none(lm, prompts, ran, tmp_path, damage):
    wanted = ResidualStore(lm, LAYER, LIMIT, tmp_path).of(prompts[:2])
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert same(ResidualStore(lm, LAYER, LIMIT, tmp_path).of(prompts[:2]), wanted)
    assert len(ran) == 2


class TestDecisions:
    """z at the decision position alone."""

    def test_they_are_the_prompts_own_in_their_order(self, lm, prompts):
        wanted = [p.z[p.tokens.edit_from] for p in store_residuals(lm, LAYER, prompts, LIMIT)]
        found = ResidualStore(lm, LAYER, LIMIT).decisions_of([*prompts, prompts[0]])
        torch.testing.assert_close(found, torch.stack([*wanted, wanted[0]]), atol=1e-4, rtol=0)

    def test_a_folder_keeps_them_apart_from_whole_prompts(self, lm, prompts, tmp_path, monkeypatch):
        ResidualStore(lm, LAYER, LIMIT, tmp_path).of(prompts[:3])
        first = ResidualStore(lm, LAYER, LIMIT, tmp_path).decisions_of(prompts[:3])
        assert len(list(tmp_path.glob("decisions-*"))) == len(list(tmp_path.iterdir())) - 1 == 1
        shown = []
        monkeypatch.setattr(residual_store, "residuals_at", None)  # nothing is run
        again = ResidualStore(lm, LAYER, LIMIT, tmp_path).decisions_of(
            prompts[:3], lambda done, total: shown.append((done, total))
        )
        assert torch.equal(again, first)
        assert shown == [(3, 3)]


class TestSubjects:
    """z of the subject's last tokens alone."""

    @pytest.fixture
    def about(self, lm):
        contexts = Contexts.build(lm.tokenizer, Scope(), lm.max_length)
        names = ["Oz", "the Kingdom of Narnia", "Bo"]
        return [
            contexts.render("bare", f"I saw {name} and left", subject=name)
            for name in [*names, names[0]]
        ]

    def test_they_are_the_prompts_own_in_their_order(self, lm, about):
        stored = store_residuals(lm, LAYER, about, FAR)
        found = ResidualStore(lm, LAYER, FAR).subjects_of(about)
        assert [len(z) for z in found] == [2, 3, 2, 2]  # bytes are tokens here
        for z, prompt in zip(found, stored, strict=True):
            torch.testing.assert_close(z, prompt.z[prompt.about], atol=1e-4, rtol=0)

    def test_sinks_are_left_out(self, lm, about):
        (whole,) = store_residuals(lm, LAYER, about[1:2], FAR)
        norms = whole.z[whole.about].float().norm(dim=-1).sort().values
        limit = float(norms[1:].mean())  # the largest is above it
        (found,) = ResidualStore(lm, LAYER, limit).subjects_of(about[1:2])
        assert len(found) == 2

    def test_a_folder_keeps_them(self, lm, about, tmp_path, monkeypatch):
        first = ResidualStore(lm, LAYER, FAR, tmp_path).subjects_of(about)
        assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["subjects"]
        monkeypatch.setattr(residual_store, "residuals_at", None)  # nothing is run
        again = ResidualStore(lm, LAYER, FAR, tmp_path).subjects_of(about)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
