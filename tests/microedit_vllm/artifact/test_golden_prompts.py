import json

import pytest

from microedit_vllm.artifact import EditSet, GoldenPrompt
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_edit_set, tiny_golden_prompts, tiny_sae

FILE = "golden_prompts.json"


@pytest.fixture
def folder(tmp_path):
    tiny_edit_set(tiny_sae()).save(tmp_path / "set")
    return tmp_path / "set"


def test_they_are_kept_with_the_set(folder):
    prompts = EditSet.load(folder).golden_prompts
    assert prompts == tiny_golden_prompts()
    assert isinstance(prompts[0], GoldenPrompt)


def test_a_set_of_an_older_release_has_none_and_loads(folder):
    (folder / FILE).unlink()
    loaded = EditSet.load(folder)
    assert loaded.golden_prompts == ()
    loaded.save(folder)
    assert not (folder / FILE).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": []}, "0.token_ids: "),
        ({"token_ids": [1, -1]}, "0.token_ids.1: "),
        ({"token_ids": [1, "2"]}, "0.token_ids.1: "),
        ({"token_ids": [1, True]}, "0.token_ids.1: "),
        ({"token_ids": None}, "0.token_ids: "),
        ({"edit_from": -1}, "0.edit_from: "),
        ({"edit_from": 4}, "edit_from 4 is beyond 4 tokens"),
        ({"ard": float("nan")}, "0.ard"),
        ({"ard": float("inf")}, "0.ard"),
        ({"ard": -0.1}, "0.ard"),
        ({"ard": None}, "the switch is on and nothing is scored"),
        ({"on": "perhaps"}, "0.on: "),
        ({"edited": [1.5]}, "0.edited.0: "),
        ({"misread": {"layer_before": float("nan")}}, "0.misread.layer_before"),
        ({"misread": {"elsewhere": 1.0}}, "0.misread.elsewhere"),
        ({"surprise": 1}, "0.surprise: "),
    ],
)
def test_hostile_prompts_are_refused(folder, changes, message):
    first, *rest = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps([first | changes, *rest]))
    refused(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("[{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ('{"prompts": []}', "the file: "),
        ("[3]", "0: "),
    ],
)
def test_an_unreadable_file_is_refused(folder, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / FILE).write_bytes(data)
    refused(folder, message)


def refused(folder, message):
    with pytest.raises(MicroEditError) as caught:
        EditSet.load(folder)
    assert message in str(caught.value)
    assert FILE in str(caught.value)
    assert "\n" not in str(caught.value)
