"""The benchmark of the kernels: its arithmetic, its verdicts, and that wrong kernels get no figure.

Its modules are imported in the tests: Triton decides at their import that they are interpreted.
"""

import importlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from microedit_kernels.edit_change import edit_change
from microedit_kernels.topk_encode import topk_encode

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "kernels.py"


def bench(name):
    return importlib.import_module(f"benchmarks.kernel_bench.{name}")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def encoder(monkeypatch):
    """A stand-in for the encode kernel, made of the reference; `spoil` makes it wrong."""

    class EncodeScratch:
        @classmethod
        def allocate(cls, max_rows, n, k, device):
            return cls()

    module = ModuleType("microedit_kernels.topk_encode.kernel")
    module.EncodeScratch = EncodeScratch
    module.spoil = lambda acts, indices: None

    def launch(z, rows, count, W_enc, bias, k, top_acts, top_indices, scratch):
        chosen = rows[: int(count)].long()
        acts, indices = topk_encode(z[chosen], W_enc, bias, k)
        module.spoil(acts, indices)
        top_acts[: len(chosen)], top_indices[: len(chosen)] = acts, indices.int()

    module.topk_encode = launch
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def changer(monkeypatch):
    """A stand-in for the edit change, made of the reference; `latents` may leave some out."""

    class EditRows(NamedTuple):
        W_enc: torch.Tensor
        b_enc: torch.Tensor
        b_dec: torch.Tensor | None
        values: torch.Tensor
        theta: float

    class GroupedSets(list):
        join = classmethod(lambda cls, sets: cls(sets))

    class EditChangeScratch:
        allocate = classmethod(lambda cls, max_rows, sets: cls())

    grouped = ModuleType("microedit_kernels.edit_change.grouped_sets")
    grouped.EditRows, grouped.GroupedSets = EditRows, GroupedSets
    launches = ModuleType("microedit_kernels.edit_change.launch_config")
    launches.launch_config = lambda rows, max_latents, d: None
    module = ModuleType("microedit_kernels.edit_change.kernel")
    module.EditChangeScratch, module.latents = EditChangeScratch, slice(None)

    def launch(hidden_states, z, rows, offsets, sets, scratch, config):
        for s, edits in enumerate(sets):
            mine, some = rows[offsets[s] : offsets[s + 1]].long(), module.latents
            delta = edit_change(
                z[mine],
                edits.W_enc[some],
                edits.b_enc[some],
                edits.b_dec,
                edits.values[some],
                edits.theta,
            )
            hidden_states[mine] = (hidden_states[mine] + delta).to(hidden_states.dtype)

    module.add_edit_change = launch
    for stand_in in (grouped, launches, module):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return module


def run(*words):
    if torch.cuda.is_available():
        pytest.skip("this process has imported the kernels for its GPU")
    return importlib.import_module("benchmarks.kernels").main(["--device", "cpu", *words])


def test_the_whole_run_from_the_command_line(tmp_path):
    """The kernels that are there, interpreted, in a process that has nothing of ours installed."""
    there = [
        name
        for name in bench("shapes").OPERATORS
        if find_spec(f"microedit_kernels.{name}.kernel") is not None
    ]
    ours = ("PYTHONPATH", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    out = tmp_path / "new" / "results"
    words = ["--device", "cpu", "--only", ",".join([*there, "step"]), "--out", str(out)]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no figure of speed" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "kernels.json",
        "kernels.md",
        "kernels.png",
    ]
    assert (out / "kernels.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "kernels.json").read_text())
    assert {figure["case"]["operator"] for figure in found["figures"]} == set(there)
    assert all(figure["seconds"] > 0 and figure["floor"] > 0 for figure in found["figures"])
    assert {step["rows"] for step in found["steps"]} == {1, 3}
    assert len(found["steps"]) == 2 * len(bench("overhead").TRAFFIC)
    assert found["bars"] == []
    for name in there:
        assert name in result.stdout and name in (out / "kernels.md").read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--only", "encode,nothing"], "no part 'nothing'"),
        (["--rows", "1,x"], "no list of numbers"),
        (["--rows", "0"], "start at 1"),
    ],
)
def test_bad_options_get_a_line(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert importlib.import_module("benchmarks.kernels").main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_right_stand_ins_pass(encoder, changer, capsys):
    assert run("--only", "encode,edit", "--rows", "1,5") == 0
    table = capsys.readouterr().out
    assert "WRONG" not in table
    assert table.count("topk_encode") == table.count("edit_change") == 4


def _drop_the_largest(acts, indices):
    acts[:, 0], indices[:, 0] = 0.0, (indices[:, 0] + 1) % 301


def _repeat(acts, indices):
    acts[:, 1], indices[:, 1] = acts[:, 0], indices[:, 0]


def _off_by_little(acts, indices):
    acts *= 1.001


def _nan(acts, indices):
    acts[-1:, 0] = torch.nan


@pytest.mark.parametrize("spoil", [_drop_the_largest, _repeat, _off_by_little, _nan])
def test_a_wrong_encode_gets_no_figure(spoil, encoder, capsys, tmp_path):
    encoder.spoil = spoil
    assert run("--only", "row_plan,encode", "--rows", "3", "--out", str(tmp_path)) == 1
    output = capsys.readouterr().out
    assert "Failed their checks" in output
    figures = json.loads((tmp_path / "kernels.json").read_text())["figures"]
    for figure in figures:
        wrong = figure["case"]["operator"] == "topk_encode"
        assert (figure["error"] is not None) == wrong
        assert (figure["seconds"] is None) == wrong
        assert (figure["over_floor"] is None) == wrong
    for line in output.split("\n"):
        if line.startswith("topk_encode") and "WRONG" in line:
            assert line.split()[-1] == "WRONG"


def test_an_edit_change_that_misses_one_latent_gets_no_figure(changer, capsys):
    changer.latents = slice(1, None)
    assert run("--only", "edit", "--rows", "8") == 1
    assert capsys.readouterr().out.count("off by") == 2


def test_a_kernel_that_raises_leaves_the_others_their_figures(encoder, capsys):
    def fails(acts, indices):
        raise ValueError("out of shared memory\nand more")

    encoder.spoil = fails
    assert run("--only", "row_plan,encode", "--rows", "3") == 1
    output = capsys.readouterr().out
    assert "ValueError: out of shared memory" in output and "and more" not in output
    assert next(line for line in output.split("\n") if line.startswith("row_plan")).count(".") > 3


def test_a_step_with_a_wrong_kernel_gets_no_figure(encoder, capsys):
    encoder.spoil = _off_by_little
    assert run("--only", "step,encode", "--rows", "1") == 1
    assert "step, M = 1: an activation is off" in capsys.readouterr().out


def test_a_check_that_writes_rows_that_are_off_is_seen(encoder, capsys):
    honest = encoder.topk_encode

    def all_rows(z, rows, count, W_enc, bias, k, top_acts, top_indices, scratch):
        everyone = torch.arange(len(z), dtype=torch.int32)
        honest(z, everyone, torch.tensor([len(z)]), W_enc, bias, k, top_acts, top_indices, scratch)

    encoder.topk_encode = all_rows
    assert run("--only", "encode", "--rows", "4") == 1
    assert "a row that is off is written" in capsys.readouterr().out


def test_a_floor_is_the_larger_of_memory_and_arithmetic():
    floors = bench("floors")
    rates = floors.Rates(read=2e12, copy=2e12, matmul=500e12)
    assert rates.floor(floors.Work(bytes=10**9)) == (pytest.approx(5e-4), "memory")
    assert rates.floor(floors.Work(10**9, flops=10**12)) == (pytest.approx(2e-3), "arithmetic")


def test_work_of_the_paper_sizes():
    """By hand: 1 GiB of W_enc at M = 64; two products with 5,000 latents."""
    shapes, adapter = bench("shapes"), bench("adapter")
    inputs = adapter.Inputs(torch.device("cpu"), 1 << 40, seed=0)
    small = shapes.SaeShape("one", d=16, n=100, k=5)
    encode = bench("topk_encode").TopkEncode(shapes.Case("topk_encode", small, 4), inputs).work()
    assert encode.bytes == 100 * 16 * 2 + 100 * 4 + 4 * 16 * 2 + 4 * 5 * 8
    assert encode.flops == 2 * 4 * 100 * 16
    assert shapes.LLAMA.n * shapes.LLAMA.d * 2 == 1 << 30
    assert (shapes.MISTRAL.n, shapes.MISTRAL.k) == (65_536, 400)


def test_decode_counts_rows_per_use_and_once():
    shapes, adapter = bench("shapes"), bench("adapter")
    inputs = adapter.Inputs(torch.device("cpu"), 1 << 40, seed=0)
    case = shapes.Case("sparse_decode", shapes.SaeShape("two", d=16, n=52, k=13), 8)
    decode = bench("sparse_decode").SparseDecode(case, inputs)
    uses, row = 8 * 13, 16 * 2
    other = 8 * row + 16 * 4 + 2 * 8 * 4 + 12 * uses
    hits = int((decode._row_map[decode._indices[0].long()] >= 0).sum())
    assert decode.work().bytes == other + (uses + hits) * row
    assert decode.work().distinct_bytes <= other + (52 + 2) * row
    assert (decode._indices.diff(dim=-1) > 0).all()


def test_inputs_take_turns_until_the_cache_holds_none():
    rotation, mebi = bench("timing").rotation, 1 << 20
    assert rotation(1024 * mebi, 50 * mebi) == 1
    assert rotation(80 * mebi, 50 * mebi) == 3
    assert rotation(8 * mebi, 50 * mebi) == 25
    assert rotation(0, 50 * mebi) == 256


class Card:
    """Stands for torch.cuda: a clock that launches move, graphs that replay what they captured."""

    def __init__(self, monkeypatch):
        self.now, self.replays = 0.0, 0
        for name in ("CUDAGraph", "Event", "graph", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def work(self, seconds):
        self.now += seconds

    def CUDAGraph(self):
        graph = SimpleNamespace(seconds=0.0)

        def replay():
            self.now += graph.seconds
            self.replays += 1

        graph.replay = replay
        return graph

    @contextmanager
    def graph(self, graph):
        start = self.now
        yield
        graph.seconds, self.now = self.now - start, start

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def synchronize(self):
        pass


@pytest.mark.parametrize("seconds", [2e-6, 1e-4, 0.2])
def test_a_graph_gives_the_time_of_one_launch(seconds, monkeypatch):
    card = Card(monkeypatch)
    timer = bench("timing").GraphTimer(0.1)
    launches = [lambda share=share: card.work(share * seconds) for share in (0.5, 1.0, 1.5)]
    assert timer(launches) == pytest.approx(seconds)
    assert 5 <= card.replays <= 62
    assert card.now < 4 or seconds > 0.1


def test_pairs_keep_their_order(monkeypatch):
    card = Card(monkeypatch)
    pairs = bench("timing").GraphTimer(0.1).alternate(lambda: card.work(1), lambda: card.work(2))
    assert len(pairs) % 2 == 0
    assert set(pairs) == {(1.0, 2.0)}


def test_no_key_is_drawn_for_rows_that_are_off():
    adapter = bench("adapter")
    inputs = adapter.Inputs(torch.device("cpu"), 1024, seed=0)
    activity = adapter.Activity(inputs, 40, num_keys=3)
    assert activity.active == 40
    for share, active in ((0.1, 4), (0.001, 1), (0.0, 0)):
        activity.draw_keys(share)
        assert activity.active == active == int((activity.keys >= 0).sum())
    activity.draw_keys(1.0)
    assert set(activity.keys.tolist()) == {0, 1, 2}


def _figure(operator, seconds, floor, edit=None, rows=64, error=None):
    shapes = bench("shapes")
    case = shapes.Case(operator, shapes.LLAMA, rows, edit)
    return bench("report").Figure(
        case, seconds=seconds, floor=floor, bound="memory", streamed=floor, error=error
    )


def test_the_verdicts():
    shapes, report, overhead = bench("shapes"), bench("report"), bench("overhead")
    figures = [
        _figure("topk_encode", 1.25e-4, 1e-4),
        _figure("topk_encode", 9e-4, 1e-4, rows=1),
        _figure("sparse_decode", 1.6e-4, 1e-4),
        _figure("edit_change", None, None, shapes.EditShape(5_000, 1), error="wrong"),
        _figure("edit_change", 9e-4, 1e-4, shapes.EditShape(500, 1)),
    ]
    step = {"operators": shapes.OPERATORS, "step": 0.01, "spread": 0.0, "noise": 0.0}
    steps = [
        overhead.Overhead(64, "100% edited", alone=0.004, inside=0.012, **step),
        overhead.Overhead(8, "100% edited", alone=0.5, inside=0.5, **step),
        overhead.Overhead(64, "0% active", alone=0.001, inside=-0.001, **step),
        overhead.Overhead(8, "0% active", alone=0.004, inside=0.003, **step),
    ]
    verdicts = {bar.name.split(",")[0]: bar.verdict for bar in report.bars(figures, steps)}
    assert verdicts == {
        "topk_encode": "met",
        "sparse_decode": "MISSED",
        "edit_change": "not measured",
        "a step with 100% edited": "MISSED",
        "a step with 0% active": "met",
    }
    lines = "\n".join(bar.line() for bar in report.bars(figures, steps))
    assert "1.25 × bar 1.25 ×" in lines and "1.20% bar 1.00%" in lines and "0.40% bar" in lines
    # Of some operators alone, a step's overhead says nothing about the bar.
    some = [overhead.Overhead(64, "0% active", ("row_plan",), alone=0.0, inside=0.0)]
    assert {bar.verdict for bar in report.bars([], some)} == {"not measured"}


def test_missed_bars_fail_only_where_asked(monkeypatch, capsys):
    session, report = bench("session"), bench("report")
    monkeypatch.setattr(session.Session, "__init__", lambda self, options: None)
    missed = report.Bar("an aim", 2.0, 1.0)
    found = {
        "environment": {"device": "a card", "timing": "graphs"},
        "rates": {"read": 1e12, "copy": 1e12, "matmul": 1e14},
        "figures": [],
        "steps": [],
        "bars": [missed],
        "seconds": 1.0,
    }
    monkeypatch.setattr(session.Session, "run", lambda self, keep: found)
    assert run() == 0
    assert run("--fail-on-bars") == 3
    assert "MISSED       an aim: 2.00 × bar 1.00 ×" in capsys.readouterr().out


def test_the_tables_line_up():
    report, overhead = bench("report"), bench("overhead")
    figures = [_figure("topk_encode", 1.25e-4, 1e-4), _figure("topk_encode", 2e-3, 1e-3, rows=8192)]
    lines = report.kernel_table(figures).split("\n")
    assert " ".join(lines[1].split()) == (
        "topk_encode LLaMA-3-8B 64 125.0 100.0 mem 1.25 100.0 1.25"
    )
    assert lines[2].split()[3:5] == ["2,000", "1,000"]
    ends = [
        line.index(word) + len(word) for line, word in zip(lines, ("M", "64", "8192"), strict=False)
    ]
    assert len(set(ends)) == 1
    markdown = report.kernel_table([*figures, _figure("edit_change", None, None, error="no")], True)
    assert len({line.count("|") for line in markdown.split("\n")}) == 1
    wrong = report.step_table([overhead.Overhead(8, "any", error="no")])
    assert wrong.split("\n")[1].split() == ["any", "8", "WRONG"]


def test_the_steps_attention_is_grouped_query_attention():
    """Against the plain form: each key head repeated for the queries of its group."""
    adapter, decode_step, shapes = bench("adapter"), bench("decode_step"), bench("shapes")
    inputs, shape = adapter.Inputs(torch.device("cpu"), 1024, seed=0), shapes.SMALL.model
    layer = decode_step.Layer(shape, inputs)
    x = inputs.normal(3, shape.d)
    cache = inputs.normal(2, 3, shape.kv_heads, shape.context, shape.head_dim)
    found = layer._attention(x, cache).float()
    q = torch.nn.functional.linear(torch.nn.functional.rms_norm(x, (shape.d,)), layer.qkv)
    q = q[:, : shape.heads * shape.head_dim].view(3, shape.heads, 1, shape.head_dim)
    k, v = cache.repeat_interleave(shape.heads // shape.kv_heads, dim=2)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v).view(3, -1).float()
    assert torch.allclose(found, plain, atol=2e-2)
