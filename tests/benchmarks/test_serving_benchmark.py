import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest

from microedit_vllm.errors import MicroEditError

PATH = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.fixture(scope="module")
def serving():
    spec = importlib.util.spec_from_file_location("benchmarks_serving", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("share", "edited"), [(0.0, 0), (0.1, 2), (1.0, 20)])
def test_the_mix_has_its_share_of_facts(serving, share, edited):
    prompts = serving.mix_prompts(["f0", "f1", "f2"], ["t0", "t1"], share, 20, seed=0)
    assert len(prompts) == 20
    assert sum(prompt.startswith("f") for prompt in prompts) == edited
    assert prompts == serving.mix_prompts(["f0", "f1", "f2"], ["t0", "t1"], share, 20, seed=0)


def test_a_mix_without_material_is_refused(serving):
    with pytest.raises(MicroEditError, match="needs facts"):
        serving.mix_prompts([], ["t"], 0.5, 4, seed=0)
    assert serving.mix_prompts([], ["t"], 0.0, 2, seed=0) == ["t", "t"]


@pytest.mark.parametrize("both_alive", [True, False])
def test_the_servers_take_turns(serving, both_alive):
    turns = serving.schedule(3, (0.0, 1.0), both_alive)
    assert len(turns) == 12
    for share in (0.0, 1.0):
        assert [kind for s, kind in turns if s == share] == ["plain", "microedit"] * 3
    switches = sum(a[1] != b[1] for a, b in itertools.pairwise(turns))
    # Where a turn is a restart, a server keeps its turn for every share.
    assert switches == (11 if both_alive else 5)


class Recorder:
    alive = 0

    def __init__(self):
        self.starts = 0

    def start(self):
        self.starts += 1
        Recorder.alive += 1

    def stop(self):
        Recorder.alive = max(0, Recorder.alive - 1)


@pytest.mark.parametrize(("both_alive", "most", "starts"), [(True, 2, 1), (False, 1, 3)])
def test_a_pair_keeps_alive_what_it_may(serving, both_alive, most, starts):
    Recorder.alive = 0
    servers = {"plain": Recorder(), "microedit": Recorder()}
    seen, warmed = [], []
    with serving.ServerPair(servers, both_alive, warmed.append) as pair:
        for _ in range(3):
            for kind in ("plain", "microedit"):
                assert pair.turn_of(kind) is servers[kind]
                seen.append(Recorder.alive)
    assert max(seen) == most
    assert Recorder.alive == 0
    assert [server.starts for server in servers.values()] == [starts, starts]
    assert len(warmed) == 2 * starts


def test_ratios_pair_the_turns(serving):
    """A machine that slows down by half in the second turn changes no ratio."""
    names = [name for name, _, _ in serving.METRICS]
    values = {"plain": [100.0, 50.0], "microedit": [90.0, 45.0]}
    runs = [
        {"server": kind, "share": 0.1} | dict.fromkeys(names, values[kind][turn])
        for turn in range(2)
        for kind in ("plain", "microedit")
    ]
    found = serving.ratios([*runs, runs[0] | {"share": 1.0}], 0.1)
    for name in names:
        assert found[name]["ratio"] == pytest.approx(0.9)
        assert found[name]["least"] == found[name]["largest"] == pytest.approx(0.9)
        assert found[name]["plain"] == 75.0


def test_the_prompt_file_is_sharegpts(serving, tmp_path):
    serving.write_prompts(tmp_path / "p.json", ["a", "é"])
    entries = json.loads((tmp_path / "p.json").read_text())
    assert [entry["conversations"][0]["value"] for entry in entries] == ["a", "é"]
    assert all(len(entry["conversations"]) == 2 for entry in entries)
