import json
import subprocess
from pathlib import Path

import pytest

from tests.builders import tiny_edit_set, tiny_sae
from tests.command_line import ended


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return ended("inspect", *arguments, COLUMNS="160")


@pytest.fixture
def folder(tmp_path):
    edit_set = tiny_edit_set(tiny_sae(), scores={"rel": 0.98765, "facts_on": 2})
    edit_set.save(tmp_path / "set")
    return tmp_path / "set"


def row(text: str, name: str) -> str:
    """The cells of the table row that starts with `name`."""
    (line,) = [line for line in text.splitlines() if line.strip("│ ").startswith(name)]
    return " ".join(line.replace("│", " ").split())


def test_a_person_sees_the_set(folder):
    result = inspect(folder)
    assert result.returncode == 0
    text = result.stdout
    assert row(text, "model") == "model tiny (000000000000, bfloat16)"
    assert row(text, "layer") == "layer 2 of 4"
    assert row(text, "latents, k") == "latents, k 48, 5"
    assert row(text, "decision") == "decision relative ARD"
    assert row(text, "tau") == "tau 0.9"
    assert row(text, "margin to edited") == "margin to edited -"
    assert row(text, "scope") == "scope window:8 in last:64"
    assert row(text, "activation") == "activation threshold, theta 0.1"
    assert row(text, "rows changed") == "rows changed 5 scoring, 3 edit"
    # 8 rows of one int64 and 12 bf16
    assert row(text, "bytes") == "bytes 256, 128 per fact"
    assert row(text, "rel") == "rel 0.988"


def test_a_person_sees_each_fact_against_tau(folder):
    text = inspect(folder).stdout
    assert row(text, "The capital of Australia is").endswith("Melbourne 0.120 on 0.200 1.000 1.000")
    # Brackets are text, not markup; what was not measured is a dash.
    assert row(text, "Who invented [the] telephone?").endswith("Clara 1.500 off - - -")


def test_a_program_sees_the_same(folder):
    result = inspect(folder, "--json")
    assert result.returncode == 0
    found = json.loads(result.stdout)
    assert found["rows_scoring"] == 5
    assert found["rows_edit"] == 3
    assert found["rows_shared"] is False
    assert (found["bytes"], found["bytes_per_fact"]) == (256, 128.0)
    assert found["decision"]["tau"] == 0.9
    assert found["scores"] == {"rel": 0.98765, "facts_on": 2}
    assert found["num_facts"] == 2
    assert [fact["on"] for fact in found["facts"]] == [True, False]


def test_the_shared_form_counts_its_one_change_once(tmp_path):
    tiny_edit_set(tiny_sae(), shared=True).save(tmp_path / "set")
    found = json.loads(inspect(tmp_path / "set", "--json").stdout)
    assert found["rows_shared"] is True
    assert found["bytes"] == 5 * (8 + 24)


def test_what_is_carried_counts(tmp_path):
    tiny_edit_set(tiny_sae(), carries=True).save(tmp_path / "set")
    found = json.loads(inspect(tmp_path / "set", "--json").stdout)
    assert found["rows_carried"] == 15
    assert found["bytes"] == (5 + 3 + 15) * (8 + 24)
    assert "5 scoring, 3 edit, 15 carried" in inspect(tmp_path / "set").stdout


def test_a_damaged_set_is_one_line_and_status_2(folder):
    path = folder / "edits.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for arguments in ((folder,), (folder, "--json")):
        result = inspect(*arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("microedit: ")
        assert result.stderr.count("\n") == 1
        assert "is damaged" in result.stderr


def test_a_missing_set_is_one_line_and_status_2(tmp_path):
    result = inspect(tmp_path / "nowhere")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
