"""The `microedit` command through its front door; a few failures through main() itself."""

import errno
import os
from importlib.metadata import EntryPoint

import pytest

from microedit_vllm import __version__
from microedit_vllm.cli import main as command_line
from microedit_vllm.errors import MicroEditError
from tests.command_line import ended


def test_version():
    result = ended("--version")
    assert (result.returncode, result.stdout) == (0, f"microedit {__version__}\n")


def test_no_sub_command_shows_the_help():
    result = ended()
    assert "inspect" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_every_sub_command():
    result = ended("--help")
    assert result.returncode == 0
    for name in ("sae", "edit", "eval", "inspect", "verify", "demo"):
        assert name in result.stdout


def test_a_wrong_sub_command_is_a_usage_error():
    result = ended("edti")
    assert result.returncode == 2
    assert "No such command" in result.stderr


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.fixture
def offer(monkeypatch):
    """Offer one object as the sub-command `try`."""

    def install(loaded) -> None:
        class Entry(EntryPoint):
            def load(self):
                if isinstance(loaded, Exception):
                    raise loaded
                return loaded

        entry = Entry("try", "nowhere:nothing", command_line.COMMANDS)
        monkeypatch.setattr(command_line, "entry_points", lambda group: [entry])

    return install


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(list(arguments))
    return stopped.value.code or 0


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MicroEditError("the target is empty;\nfill it in"), 2, "the target is empty; fill it in"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "disk is full"),
    ],
)
def test_expected_failures_are_one_line(offer, capsys, error, status, line):
    offer(raising(error))
    assert status_of("try") == status
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"microedit: {line}\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EIO, "broken disk")])
def test_other_errors_keep_their_traceback(offer, error):
    offer(raising(error))
    with pytest.raises(type(error)):
        command_line.main(["try"])


def test_a_function_is_a_command_with_its_own_options(offer, capsys):
    def greet(name: str, loud: bool = False) -> None:
        print(name.upper() if loud else name)

    offer(greet)
    assert status_of("try", "ada", "--loud") == 0
    assert capsys.readouterr().out == "ADA\n"
    assert status_of("try") == 2


def test_an_app_with_one_command_is_still_a_group(offer, capsys):
    import typer

    app = typer.Typer()
    app.command("train")(lambda: print("trained"))
    offer(app)
    assert status_of("try", "train") == 0
    assert capsys.readouterr().out == "trained\n"


def test_a_sub_command_that_cannot_be_imported_breaks_no_other(offer, capsys):
    offer(ImportError("No module named 'extras'"))
    assert status_of("--help") == 0
    assert "inspect" in capsys.readouterr().out
    assert status_of("inspect", "/nowhere") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert status_of("try", "--any", "thing") == 2
    assert "'try' is not available (ImportError: No module named" in capsys.readouterr().err
