import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from microedit_vllm.artifact import EditSet
from microedit_vllm.artifact.edit_set import relative_sae_path
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_edit_set, tiny_sae


@pytest.fixture
def folder(tmp_path):
    tiny_edit_set(tiny_sae()).save(tmp_path / "set")
    return tmp_path / "set"


def rewrite(path, **changes):
    tensors = load_file(path)
    tensors.update(changes)
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


def refused(folder, message):
    with pytest.raises(MicroEditError, match=message) as caught:
        EditSet.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shared", [False, True])
def test_round_trip(tmp_path, shared):
    edit_set = tiny_edit_set(tiny_sae(), shared=shared)
    edit_set.save(tmp_path / "set")
    loaded = EditSet.load(tmp_path / "set")
    assert loaded.manifest == edit_set.manifest
    assert loaded.facts == edit_set.facts
    assert loaded.is_shared is shared
    for name in ("scoring", "edit"):
        found, wanted = getattr(loaded, name), getattr(edit_set, name)
        assert torch.equal(found.indices, wanted.indices)
        assert found.values.dtype == torch.bfloat16
        assert torch.equal(found.values, wanted.values)
    assert loaded.golden.tensors.keys() == edit_set.golden.tensors.keys()
    for name, tensor in edit_set.golden.tensors.items():
        assert torch.equal(getattr(loaded.golden, name), tensor)


def test_a_carried_change_comes_back_and_is_missed_where_it_is_not_there(tmp_path):
    edit_set = tiny_edit_set(tiny_sae(), carries=True)
    edit_set.save(tmp_path / "set")
    loaded = EditSet.load(tmp_path / "set")
    assert loaded.manifest.version == 2
    assert list(loaded.changes) == ["scoring", "edit", "carried"]
    assert torch.equal(loaded.carried.indices, edit_set.carried.indices)
    assert torch.equal(loaded.carried.values, edit_set.carried.values)
    tensors = load_file(tmp_path / "set" / "edits.safetensors")
    del tensors["carried.values"]
    save_file(tensors, tmp_path / "set" / "edits.safetensors")
    refused(tmp_path / "set", "tensor 'carried.values' is missing")


def test_a_set_that_carries_nothing_is_of_the_first_version(folder):
    loaded = EditSet.load(folder)
    assert loaded.manifest.version == 1
    assert loaded.carried is None
    assert loaded.manifest.carries is False


def test_the_shared_form_stores_one_change(tmp_path):
    tiny_edit_set(tiny_sae(), shared=True).save(tmp_path / "set")
    assert set(load_file(tmp_path / "set" / "edits.safetensors")) == {
        "scoring.indices",
        "scoring.values",
    }


def test_saving_again_replaces_the_folder(folder):
    (folder / "stray.txt").write_text("of an older version")
    edit_set = replace(EditSet.load(folder), facts=[])
    edit_set.save(folder)
    assert EditSet.load(folder).facts == []
    assert not (folder / "stray.txt").exists()


def test_an_interrupted_save_keeps_the_old_set(folder, monkeypatch):
    edit_set = replace(EditSet.load(folder), facts=[{"prompt": "new"}])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("microedit_vllm.artifact.edit_set.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit_set.save(folder)
    assert len(EditSet.load(folder).facts) == 2
    assert list(folder.parent.iterdir()) == [folder]


def test_non_ascii_facts_survive(tmp_path):
    facts = [{"prompt": "Wie heißt 東京?\u2028", "target": "é"}]
    replace(tiny_edit_set(tiny_sae()), facts=facts).save(tmp_path / "set")
    assert EditSet.load(tmp_path / "set").facts == facts


NAN_ROW = torch.zeros(3, 12).index_fill(0, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring.indices": None}, "'scoring.indices' is missing"),
        ({"edit.values": None}, "'edit.values' is missing"),
        ({"edit.indices": None}, "'edit.indices' is missing"),
        ({"edit.indices": torch.tensor([0, 1, 48])}, "outside 0…47"),
        ({"edit.indices": torch.tensor([0, -1, 4])}, "outside 0…47"),
        ({"edit.indices": torch.tensor([0, 4, 4])}, "repeats"),
        ({"edit.indices": torch.tensor([0, 1, 2], dtype=torch.int32)}, "int32, expected int64"),
        ({"edit.indices": torch.tensor([0.0, 1.0, 2.0])}, "float32, expected int64"),
        ({"edit.indices": torch.tensor([[0, 1, 2]])}, "1×3, expected any"),
        ({"edit.indices": torch.tensor([0, 1])}, "3×12, expected 2×12"),
        ({"edit.values": torch.zeros(3, 11)}, "3×11, expected 3×12"),
        ({"edit.values": torch.zeros(3, 12, dtype=torch.int64)}, "not of a float type"),
        ({"edit.values": NAN_ROW}, "NaN or infinite"),
        ({"scoring.values": torch.full((5, 12), torch.inf)}, "NaN or infinite"),
    ],
)
def test_hostile_changes_are_refused(folder, changes, message):
    rewrite(folder / "edits.safetensors", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": None}, "'z' is missing"),
        ({"z": torch.zeros(0, 12)}, "no golden activations"),
        ({"z": torch.zeros(3, 11)}, "3×11"),
        ({"top_indices": torch.zeros(3, 4, dtype=torch.int64)}, "3×4, expected 3×5"),
        ({"dist": torch.full((3,), torch.nan)}, "NaN or infinite"),
    ],
)
def test_hostile_golden_activations_are_refused(folder, changes, message):
    rewrite(folder / "golden.safetensors", **changes)
    refused(folder, message)


@pytest.mark.parametrize("name", ["edits.safetensors", "golden.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: struct.pack("<Q", 90_000_000) + data[8:],
        lambda data: struct.pack("<Q", 4) + b"null" + data,
        lambda data: struct.pack("<Q", 50_000) + b"[" * 50_000,
    ],
    ids=["empty", "no header", "cut", "halved", "huge", "too long", "null", "nested"],
)
def test_damaged_safetensors_are_refused(folder, name, damage):
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, "is damaged")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("microedit.json", None, "not an edit set: microedit.json is missing"),
        ("microedit.json", "layer: 2", "cannot be read"),
        ("microedit.json", "[" * 100_000, "cannot be read"),
        ("microedit.json", b"\xff\xfe", "cannot be read"),
        ("microedit.json", "[1]", "format version None"),
        ("edits.safetensors", None, "is missing"),
        ("golden.safetensors", None, "is missing"),
        ("facts.jsonl", None, "cannot be read"),
        ("facts.jsonl", "{", "cannot be read"),
        ("facts.jsonl", "3\n", "something else than JSON objects"),
        ("facts.jsonl", "[" * 100_000, "cannot be read"),
        ("facts.jsonl", b"\xff\xfe", "cannot be read"),
    ],
)
def test_missing_and_unreadable_files_are_refused(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    refused(folder, message)


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "is not a folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "format version 3, this release reads 1 and 2"),
        (
            {"version": 2, "placement": "replace", "activation": "topk", "theta": None},
            "a carried change needs delta placement",
        ),
        ({"version": "1"}, "format version '1'"),
        ({"version": None}, "format version None"),
        ({"format": "something-else"}, "format: "),
        ({"layer": 4}, "layer 4 is beyond the model's 4"),
        ({"layer": -1}, "layer: "),
        ({"layer": None}, "layer: "),
        ({"surprise": 1}, "surprise: "),
        ({"theta": None}, "needs theta"),
        ({"theta": float("nan")}, "theta: "),
        ({"placement": "replace"}, "needs theta and delta"),
        ({"decision": {"statistic": "absolute"}}, "decision"),
    ],
)
def test_an_inconsistent_manifest_is_refused(folder, changes, message):
    path = folder / "microedit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 0}, "decision.tau"),
        ({"tau": float("inf")}, "decision.tau"),
        ({"statistic": "absolute"}, "needs alpha"),
        ({"max_norm": -1}, "decision.max_norm"),
        ({"scope": {"last": 0, "run": 8}}, "decision.scope.last"),
        ({"scope": {"last": 64, "run": -1}}, "decision.scope.run"),
    ],
)
def test_an_inconsistent_decision_is_refused(folder, changes, message):
    path = folder / "microedit.json"
    manifest = json.loads(path.read_text())
    manifest["decision"] |= changes
    path.write_text(json.dumps(manifest))
    refused(folder, message)


def test_another_sae_is_refused(tmp_path):
    sae, other = tiny_sae().save(tmp_path / "sae"), tiny_sae(seed=1).save(tmp_path / "other")
    edit_set = tiny_edit_set(sae)
    edit_set.check_sae(sae, tmp_path / "sae")
    with pytest.raises(MicroEditError, match="is not the one that the edit set was made with"):
        edit_set.check_sae(other, tmp_path / "other")


def test_another_model_is_refused():
    edit_set = tiny_edit_set(tiny_sae())
    edit_set.check_model("0" * 64, "tiny")
    with pytest.raises(MicroEditError, match=r"was made for tiny .* not for other"):
        edit_set.check_model("1" * 64, "other")


def test_the_sae_is_found_from_the_set_after_both_moved(tmp_path):
    path = relative_sae_path(tmp_path / "sae", tmp_path / "sets" / "mine")
    assert path == "../../sae"
    edit_set = tiny_edit_set(tiny_sae())
    moved = tmp_path / "elsewhere" / "set"
    assert edit_set.sae_folder(moved).resolve() == tmp_path / "elsewhere" / "sae"
    assert edit_set.sae_folder(moved, tmp_path / "named") == tmp_path / "named"
