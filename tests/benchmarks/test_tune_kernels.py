import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tune_kernels
from microedit_kernels import launch_table
from microedit_kernels.edit_change.launch_config import LaunchConfig
from microedit_kernels.sparse_decode.launch import DecodeConfig
from microedit_kernels.topk_encode.launch import EncodeConfig

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "topk_encode": EncodeConfig,
    "sparse_decode": DecodeConfig,
    "edit_change": LaunchConfig,
}


def test_the_shipped_table_is_made_of_candidates():
    table = launch_table.table()
    assert set(table) == {"measured_on", *tune_kernels.CANDIDATES}
    for operator, lines in tune_kernels.CANDIDATES.items():
        for (most, settings), (wanted, _, candidates) in zip(table[operator], lines, strict=True):
            assert most == wanted
            chosen = CONFIGS[operator](**settings)
            assert chosen in [CONFIGS[operator](**candidate) for candidate in candidates]


def test_a_table_is_written_as_it_is_read():
    table = launch_table.table()
    assert json.loads(tune_kernels.text(table)) == table


def test_the_fastest_that_is_right_is_chosen(monkeypatch):
    tuner = tune_kernels.Tuner("cpu")
    times = {16: 3.0, 32: None, 64: 2.0}
    candidates = [{"columns": columns} for columns in times]
    monkeypatch.setitem(tune_kernels.CANDIDATES, "sparse_decode", [(99, 1, candidates)])
    monkeypatch.setattr(tuner, "seconds", lambda operator, s, batch: times[s["columns"]])
    assert list(tuner.lines("sparse_decode")) == [(99, {"columns": 64})]
    monkeypatch.setattr(tuner, "seconds", lambda *_: None)
    with pytest.raises(RuntimeError, match="no candidate of sparse_decode"):
        list(tuner.lines("sparse_decode"))


def test_it_runs_from_the_command_line(tmp_path):
    words = ["--device", "cpu", "--only", "sparse_decode", "--out", str(tmp_path / "table.json")]
    run = subprocess.run(
        [sys.executable, "benchmarks/tune_kernels.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["measured_on"].startswith("the interpreter")
    assert table["topk_encode"] == launch_table.table()["topk_encode"]
    assert "µs" in run.stderr and "wrong" not in run.stderr
