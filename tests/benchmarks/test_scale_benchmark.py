import json
import sys
from collections import Counter

import pytest

from benchmarks import scale
from benchmarks.synthetic_facts import FACTS_PER_SUBJECT, synthetic_facts
from tests.trainer.conftest import lm, sae_folder  # noqa: F401 (fixtures)


def test_facts_are_distinct_seeded_and_grow_at_the_end():
    facts = synthetic_facts(3000)
    assert len({f.prompt for f in facts}) == len({f.paraphrases for f in facts}) == 3000
    assert facts[:50] == synthetic_facts(50) != synthetic_facts(50, seed=1)
    assert max(Counter(f.subject for f in facts).values()) == FACTS_PER_SUBJECT
    for fact in facts:
        assert fact.subject in fact.prompt and fact.subject in fact.paraphrases[0]
        assert len(fact.prompt.split()) >= 4
    # Neither wording nor subject alone tells the answer.
    wordings = Counter(f.prompt.replace(f.subject, "{}") for f in facts)
    assert len(wordings) == 30 and min(wordings.values()) > 50
    assert len({f.target for f in facts}) > 150


@pytest.fixture
def measure(lm, sae_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """What the script prints for four facts, with further arguments."""

    def run(*further: str) -> dict:
        arguments = [
            *("scale.py", "--model", str(lm.folder), "--sae", str(sae_folder), "--facts", "4"),
            *("--targets", str(tmp_path / "kept"), "--scored", "2", "--contexts", "bare"),
            *("--out", str(tmp_path / "scale.json"), *further),
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(scale, "OTHERS", 2)
        scale.main()
        capsys.readouterr()
        return json.loads((tmp_path / "scale.json").read_text())

    return run


def test_the_script_says_what_a_run_took(measure):
    printed = measure("--add-one", "--compare-dense")
    assert printed["facts"] == 4 and printed["add_one"]["facts"] == 5
    for stage in ("layers below", "facts", "scoring change", "edit change", "scores"):
        assert stage in printed["seconds"]
    assert sum(printed["seconds"].values()) == pytest.approx(printed["seconds_in_all"], abs=0.5)
    assert 0 <= printed["rel"] <= 1 and printed["peak_gib"] > 0.1
    assert printed["bare"]["gen"] is not None and printed["scored_facts"] == 2
    assert printed["kept_mib"] > 0
    assert printed["apart_from_dense"] and max(printed["apart_from_dense"]) < 1e-4


def test_the_sequential_solver_is_measured_fact_by_fact(measure):
    printed = measure("--solver", "sequential", "--passes", "2")
    assert "facts" in printed["seconds"] and "edit change" not in printed["seconds"]
    peaks = printed["peak_gib_on_the_way"]
    assert list(peaks) == ["10%", "50%", "100%"]
    assert 0.1 < peaks["10%"] <= peaks["100%"] <= printed["peak_gib"]
