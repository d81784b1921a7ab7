import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import cpu_share
from benchmarks.cpu_share import Step
from microedit_trainer.demo.server import ENVIRONMENT
from microedit_vllm.artifact import EditOperator, EditSet
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_edit_set, tiny_sae
from tests.microedit_vllm.engine.in_process import engine_here
from tests.microedit_vllm.engine.tiny_served import tiny_served


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("shared", [False, True])
def test_before_and_after_give_the_same_bits(shared):
    sae = tiny_sae()
    operator = EditOperator.build(tiny_edit_set(sae, shared=shared), sae)
    # So many that the few changed latents are among the top k of some.
    z = torch.randn(256, sae.d_in, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = cpu_share.operators(operator)
    assert list(found) == (["topk"] if shared else ["threshold", "topk"])
    for activation, sides in found.items():
        before, after = (sides[side] for side in cpu_share.SIDES)
        assert before.edit.values.dtype == torch.bfloat16 != after.edit.values.dtype
        assert after.edit_set.manifest.activation == activation
        assert torch.equal(before.edited(z), after.edited(z))
        assert not torch.equal(after.edited(z), z.float())
        for one, other in zip(before.encode(z), after.encode(z), strict=True):
            assert torch.equal(one, other)


def test_shares_are_of_a_step_and_by_side():
    steps = [
        Step("topk", 8, side, 10.0 * slow, seconds * slow)
        for slow in (1.0, 3.0, 1.0)
        for side, seconds in (("before", 2.0), ("after", 0.5))
    ]
    (row,) = cpu_share.shares(steps)
    assert (row["activation"], row["requests"], row["before"]["steps"]) == ("topk", 8, 3)
    assert row["before"]["share"] == pytest.approx(0.2)
    assert row["after"]["low"] == row["after"]["high"] == pytest.approx(0.05)
    assert row["faster"] == 4


def _count_calls(monkeypatch, kind, found):
    """Note `kind` at each call of its `encode`."""
    encode = kind.encode

    def counted(self, z):
        found.append(kind)
        return encode(self, z)

    monkeypatch.setattr(kind, "encode", counted)


def test_every_row_is_on_in_the_steps_that_count(tmp_path, monkeypatch):
    """The command line on a real engine; the facts' prompts are made-up tokens here."""
    served = tiny_served(tmp_path)
    app = cpu_share.typer.Typer()
    app.command()(cpu_share.main)
    out = tmp_path / "cpu_share.json"
    words = ["--model", str(served.model), "--edits", str(served.edit_set), "--out", str(out)]
    words += ["--requests", "1", "--requests", "3", "--tokens", "24", "--repeats", "2"]
    monkeypatch.setattr(
        cpu_share, "fact_prompts", lambda *_: [*served.edited[:2], served.unrelated[4]]
    )
    encoded = []
    for kind in (EditOperator, cpu_share.EarlierOperator):
        _count_calls(monkeypatch, kind, encoded)
    with engine_here(served.model, **_arguments(served)) as llm:
        monkeypatch.setattr(cpu_share, "start", lambda *_, **__: llm)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output or result.exception
        report = json.loads(out.read_text())
        assert (report["facts"], report["facts_on"]) == (3, 2)
        kinds = [(row["activation"], row["requests"]) for row in report["shares"]]
        assert kinds == [("threshold", 1), ("threshold", 3), ("topk", 1), ("topk", 3)]
        for row in report["shares"]:
            counts = [row[side]["steps"] for side in cpu_share.SIDES]
            assert min(counts) >= 8 and max(counts) - min(counts) <= 4
            assert all(0 < row[side]["share"] < 1 for side in cpu_share.SIDES)
        # By the Top-k each step that decodes encodes, on its own side.
        rows = report["shares"][2:]
        steps = {side: sum(row[side]["steps"] for row in rows) for side in cpu_share.SIDES}
        assert encoded.count(cpu_share.EarlierOperator) >= steps["before"]
        assert encoded.count(EditOperator) >= steps["after"]


def test_requests_that_are_off_give_no_figures(tmp_path):
    served = tiny_served(tmp_path)
    with engine_here(served.model, **_arguments(served)) as llm:
        with pytest.raises(MicroEditError, match="none of the set's 1 facts"):
            cpu_share.on_prompts(llm, [served.unrelated[4]])
        with pytest.raises(MicroEditError, match="was off"):
            cpu_share.measure(llm, [served.unrelated[4]], [1], tokens=4, repeats=1)


def test_a_set_without_facts_is_refused(tmp_path):
    empty = tiny_edit_set(tiny_sae())
    EditSet(empty.manifest, empty.scoring, empty.edit, empty.golden).save(tmp_path / "set")
    with pytest.raises(MicroEditError, match="no facts"):
        cpu_share.fact_prompts("unused", tmp_path / "set")


def _arguments(served):
    setting = {"microedit": {"edit_set": str(served.edit_set)}}
    return {
        "max_model_len": 128,
        "max_num_seqs": 4,
        "async_scheduling": False,
        "additional_config": setting,
    }
