"""What `microedit verify` says before anything runs; servers and engines are in `engine/`."""

import pytest

from microedit_vllm.cli.main import main
from tests.builders import tiny_edit_set, tiny_sae


@pytest.fixture
def folder(tmp_path):
    tiny_edit_set(tiny_sae()).save(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def refused(capsys):
    """The one line of a start that must fail with status 2."""

    def refused(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["verify", *map(str, words)])
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return refused


def test_either_a_server_or_a_model(folder, refused):
    assert "either --url" in refused(folder)
    assert "either --url" in refused(folder, "--url", "http://localhost:1", "--model", "m")
    assert "--sae goes with --model" in refused(folder, "--url", "http://localhost:1", "--sae", "s")


@pytest.mark.parametrize("where", [("--url", "http://localhost:1"), ("--model", "m")])
def test_a_set_of_an_older_release_must_be_made_again(folder, refused, where):
    (folder / "golden_prompts.json").unlink()
    line = refused(folder, *where)
    assert "no golden prompts" in line
    assert "make it again" in line


def test_no_edit_set(tmp_path, refused):
    assert "is not a folder" in refused(tmp_path / "nowhere", "--url", "http://localhost:1")


def test_no_server(folder, refused):
    line = refused(folder, "--url", "http://127.0.0.1:9")
    assert "no server with a model answers at http://127.0.0.1:9" in line
    assert "no server with a model answers" in refused(folder, "--url", "not a url")
