"""Each planted fault turns the random schedules red: a test that cannot fail proves nothing."""

from pathlib import Path

import pytest

from tests.microedit_vllm.engine.mutations import MUTATIONS, Mutation
from tests.microedit_vllm.engine.schedule_trace import REUSED_BLOCKS, Run, check_seed
from tests.microedit_vllm.engine.tiny_served import TinyServed, tiny_served

SEEDS = (*range(10), REUSED_BLOCKS)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyServed]:
    forms = {mutation.form for mutation in MUTATIONS}
    return {form: tiny_served(tmp_path_factory.mktemp(form), form) for form in forms}


@pytest.fixture(scope="module")
def plain_runs() -> dict[str, dict[int, Run]]:
    return {mutation.form: {} for mutation in MUTATIONS}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_fault_is_seen(
    served, plain_runs, monkeypatch, mutations_seen, mutation: Mutation
):
    mutation.plant(monkeypatch)
    for seed in (mutation.seed, *SEEDS):
        of_form = served[mutation.form], plain_runs[mutation.form]
        report = check_seed(of_form[0], seed, plain_runs=of_form[1])
        broken = {invariant for invariant, _ in report.violations}
        if broken & set(mutation.breaks):
            mutations_seen[mutation.name] = f"breaks {sorted(broken)}, seen by schedule {seed}"
            return
    pytest.fail(f"{mutation.name}: no schedule broke {mutation.breaks}")


def test_the_documented_list_names_every_fault():
    text = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
    for mutation in MUTATIONS:
        invariants = ", ".join(map(str, mutation.breaks))
        assert f"| {mutation.name} | {invariants} |" in text
