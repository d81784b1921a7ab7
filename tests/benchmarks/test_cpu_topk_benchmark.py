import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import cpu_topk
from microedit_vllm.errors import MicroEditError


@pytest.mark.parametrize("name", cpu_topk.WAYS)
@pytest.mark.parametrize("positives", ["many", "few"])
@pytest.mark.parametrize("n", [320, 333])
def test_each_way_chooses_as_the_reference(name, positives, n):
    rows = cpu_topk.make_rows(5, n, 7, positives, seed=1)
    # Ties across the k-th place among the positive ones too.
    rows = (rows * 4).round() / 4
    cpu_topk.check(name, cpu_topk.WAYS[name], rows, 7)


def test_few_positives_are_fewer_than_k_and_many_are_many():
    few = (cpu_topk.make_rows(64, 2_000, 50, "few", 0) > 0).sum(-1)
    many = (cpu_topk.make_rows(64, 2_000, 50, "many", 0) > 0).sum(-1)
    assert few.max() < 50 < 400 < many.min()


def test_a_way_that_chooses_something_else_gives_no_figures():
    rows = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    wrong_tie = lambda rows, k: torch.tensor([[2]])  # noqa: E731
    with pytest.raises(MicroEditError, match="no figures"):
        cpu_topk.check("by key", wrong_tie, rows, 1)
    cpu_topk.check(cpu_topk.FLOOR, wrong_tie, rows, 1)


def test_from_the_command_line(tmp_path):
    app = cpu_topk.typer.Typer()
    app.command()(cpu_topk.main)
    out = tmp_path / "cpu_topk.json"
    result = CliRunner().invoke(app, ["--quick", "--repeats", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output or result.exception
    cases = json.loads(out.read_text())["cases"]
    assert [case["positives"] for case in cases] == ["many", "few"] * 2
    for case in cases:
        assert case["ways"].keys() == cpu_topk.WAYS.keys()
        assert case["ways"][cpu_topk.BASELINE]["ratio"] == 1
        assert all(0 < way["least"] <= way["ratio"] for way in case["ways"].values())
