import errno
import os

import pytest
from safetensors import SafetensorError

from microedit_vllm.artifact.atomic import atomic_folder, write_atomically
from microedit_vllm.errors import MicroEditError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TORCH_FULL = SafetensorError("I/O error: No space left on device (os error 28)")


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture(params=["new", "existing"])
def target(request, tmp_path):
    """A target folder's path; with an older version in it for `existing`."""
    folder = tmp_path / "deep" / "set"
    if request.param == "existing":
        folder.mkdir(parents=True)
        (folder / "old.txt").write_text("old")
    return folder


def test_the_folder_appears_whole_and_without_droppings(target):
    with atomic_folder(target) as draft:
        (draft / "a.txt").write_text("a")
        assert not (target / "a.txt").exists()
    assert contents(target) == {"a.txt": "a"}
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (FULL, MicroEditError),
        (TORCH_FULL, MicroEditError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("bug"), RuntimeError),
    ],
    ids=["disk full", "disk full in safetensors", "Ctrl-C", "bug"],
)
def test_a_failure_keeps_the_old_and_leaves_no_droppings(target, failure, raised):
    before = contents(target) if target.exists() else None
    with pytest.raises(raised), atomic_folder(target) as draft:
        (draft / "a.txt").write_text("half")
        raise failure
    assert (contents(target) if target.exists() else None) == before
    assert [path for path in target.parent.iterdir() if path != target] == []


def test_a_failure_in_the_swap_puts_the_old_back(tmp_path, monkeypatch):
    """The second rename, draft to target, fails: the first already moved the old one away."""
    target = tmp_path / "set"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = type(target).rename
    calls = []

    def failing(self, to):
        calls.append(to)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", failing)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as draft:
        (draft / "a.txt").write_text("a")
    assert contents(target) == {"old.txt": "old"}
    assert list(target.parent.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(MicroEditError, match="cannot write"),
        atomic_folder(tmp_path / "file" / "set"),
    ):
        pass


def test_a_file_is_replaced_whole(tmp_path):
    write_atomically(tmp_path / "x.json", b"old")
    write_atomically(tmp_path / "x.json", b"new")
    assert contents(tmp_path) == {"x.json": "new"}


@pytest.mark.parametrize(
    ("failure", "raised"), [(FULL, MicroEditError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failed_file_keeps_the_old(tmp_path, monkeypatch, failure, raised):
    target = tmp_path / "x.json"
    target.write_text("old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(raised):
        write_atomically(target, b"new")
    assert contents(tmp_path) == {"x.json": "old"}
