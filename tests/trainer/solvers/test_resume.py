import errno
import os
from dataclasses import replace

import pytest
import torch

from microedit_trainer.contexts import PromptTokens
from microedit_trainer.solvers.resume import (
    TargetStore,
    open_work_folder,
    read_checkpoint,
    write_checkpoint,
)
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact import atomic
from microedit_vllm.errors import MicroEditError

RUN = {"model": "m", "facts": [{"prompt": "p", "paraphrases": ("a", "b")}], "layer": 1}


def batch_of(*answers: int) -> list[StoredPrompt]:
    """Prompts whose answers have so many tokens."""
    return [
        StoredPrompt(
            PromptTokens((1, 2, 3), tuple(range(count)), 0, (1, 2)),
            torch.zeros(3 + count, 4),
            torch.zeros(3 + count, dtype=torch.bool),
        )
        for count in answers
    ]


def deltas_of(*answers: int) -> list[torch.Tensor]:
    return [torch.randn(count + 1, 4) for count in answers]


def test_the_same_run_finds_its_work_again(tmp_path):
    work = tmp_path / "deep" / "work"
    assert open_work_folder(work, RUN) is False
    (work / "something").write_text("done")
    assert open_work_folder(work, dict(reversed(RUN.items()))) is True
    assert (work / "something").read_text() == "done"


@pytest.mark.parametrize(
    "change",
    [{"layer": 2}, {"facts": []}, {"new": 1}, {"facts": [{"prompt": "p", "paraphrases": ("a",)}]}],
)
def test_work_of_another_run_is_dropped(tmp_path, change):
    open_work_folder(tmp_path / "work", RUN)
    (tmp_path / "work" / "something").write_text("done")
    assert open_work_folder(tmp_path / "work", RUN | change) is False
    assert not (tmp_path / "work" / "something").exists()


def test_a_folder_without_its_marker_is_dropped(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "targets-00000.safetensors").write_text("whose?")
    assert open_work_folder(tmp_path / "work", RUN) is False
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["run.json"]


def store_in(folder, d=4, origin="here"):
    return TargetStore(folder, d, origin)


def equal(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[i], wanted[i]) for i in found)


def test_targets_come_back_bit_for_bit_wherever_their_prompts_are(tmp_path):
    first, second = batch_of(2, 5), batch_of(3)
    one, other = deltas_of(2, 5), deltas_of(3)
    store_in(tmp_path).write(first, one)
    store_in(tmp_path).write(second, other)
    assert equal(store_in(tmp_path).read([*first, *second]), dict(enumerate([*one, *other])))
    mixed = [*batch_of(7), *second, first[1], first[1]]
    assert equal(store_in(tmp_path).read(mixed), {1: other[0], 2: one[1], 3: one[1]})


def test_targets_of_other_prompts_settings_and_widths_are_not_taken(tmp_path):
    batch = batch_of(2)
    store_in(tmp_path).write(batch, deltas_of(2))
    assert store_in(tmp_path, origin="elsewhere").read(batch) == {}
    assert store_in(tmp_path, d=5).read(batch) == {}
    tokens = batch[0].tokens
    for change in ({"prompt_ids": (1, 2, 4)}, {"answer_ids": (0, 2)}, {"end_id": 9}):
        assert store_in(tmp_path).read([replace(batch[0], tokens=replace(tokens, **change))]) == {}


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-3], lambda b: b"\xff" * len(b)])
def test_a_damaged_checkpoint_counts_as_none(tmp_path, damage):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, {"a": torch.arange(4)})
    assert read_checkpoint(path)["a"].tolist() == [0, 1, 2, 3]
    path.write_bytes(damage(path.read_bytes()))
    assert read_checkpoint(path) is None


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, {"a": torch.arange(4)})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(MicroEditError, match=r"cannot write .*No space left"):
        write_checkpoint(path, {"a": torch.arange(9)})
    assert read_checkpoint(path)["a"].tolist() == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_gradients_and_views_can_be_kept(tmp_path):
    values = torch.arange(6.0).view(2, 3).requires_grad_()
    write_checkpoint(tmp_path / "c", {"t": values.T})
    assert read_checkpoint(tmp_path / "c")["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
