import json
import random

import pytest
from typer.testing import CliRunner

from benchmarks import idle_cost
from benchmarks.offline_engine import Batch, Output
from microedit_vllm.errors import MicroEditError
from tests.microedit_vllm.engine.tiny_served import tiny_served

TRAFFIC = idle_cost.Traffic("short", 8, 2, bar=0.9)
OFF = {"on": False, "ard": 1.1, "tau": 0.7}


def test_the_engines_take_turns_at_going_first():
    order = [kind for pair in idle_cost.turns(4) for kind in pair]
    assert order == ["plain", "microedit", "microedit", "plain"] * 2


def test_no_two_requests_share_a_beginning():
    prompts = TRAFFIC.prompts(100, vocabulary=40_000, draw=random.Random(0))
    assert {len(prompt) for prompt in prompts} == {8}
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 100
    assert min(min(prompt) for prompt in prompts) >= idle_cost.FIRST_TOKEN


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("plain", Output((1,), 0, None)),
        ("plain", Output((1, 2), 4, None)),
        ("microedit", Output((1, 2), 0, {**OFF, "on": True})),
        ("microedit", Output((1, 2), 0, {**OFF, "ard": None})),
        ("microedit", Output((1, 2), 0, None)),
    ],
)
def test_a_run_that_measured_something_else_gives_no_figures(kind, output):
    good = Output((1, 2), 0, OFF if kind == "microedit" else None)
    idle_cost.check(Batch([good], 1.0), TRAFFIC, kind)
    with pytest.raises(MicroEditError, match="no figures"):
        idle_cost.check(Batch([good, output], 1.0), TRAFFIC, kind)


def test_ratios_pair_the_turns():
    """A machine that is ten times slower in the second turn changes no ratio."""
    runs = [
        idle_cost.Run("short", kind, factor * seconds, 2 * factor, 0.01 * factor, factor)
        for factor in (1.0, 10.0)
        for kind, seconds in (("microedit", 1.25), ("plain", 1.0))
    ]
    found = idle_cost.ratios(runs, TRAFFIC)
    assert found["seconds"]["ratio"] == found["seconds"]["least"] == pytest.approx(0.8)
    assert found["cpu_seconds"]["ratio"] == 1
    assert found["idle_share"] == pytest.approx(0.22 / 24.75)
    assert found["load"] == [1.0, 10.0]
    assert found["met"] is False
    assert idle_cost.ratios(runs, idle_cost.Traffic("short", 8, 2, bar=0.8))["met"] is True


def test_two_real_engines_from_the_command_line(tmp_path, monkeypatch):
    # One process and one thread an engine: it is the benchmark that is tested, not the engine.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    served = tiny_served(tmp_path)
    app = idle_cost.typer.Typer()
    app.command()(idle_cost.main)
    out = tmp_path / "idle_cost.json"
    words = ["--model", str(served.model), "--edits", str(served.edit_set), "--out", str(out)]
    result = CliRunner().invoke(app, [*words, "--quick", "--repeats", "2", "--requests", "3"])
    assert result.exit_code == 0, result.output or result.exception
    report = json.loads(out.read_text())
    for traffic in ("decode-heavy", "prefill-heavy"):
        runs = [run for run in report["runs"] if run["traffic"] == traffic]
        assert [run["engine"] for run in runs] == ["microedit", "plain", "plain", "microedit"]
        # CPU time is counted in ticks, and a run of this size may end within one.
        assert all(run["seconds"] > 0 and run["cpu_seconds"] >= 0 for run in runs)
        assert traffic in result.output
