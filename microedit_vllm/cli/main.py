"""`microedit`: the root command, which finds its sub-commands through entry points."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from microedit_vllm import __version__
from microedit_vllm.errors import MicroEditError

COMMANDS = "microedit.commands"
OWN_COMMANDS = (
    EntryPoint("inspect", "microedit_vllm.cli.inspect:inspect", COMMANDS),
    EntryPoint("verify", "microedit_vllm.cli.verify:verify", COMMANDS),
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    with _one_line_errors():
        typer.main.get_command(app)(arguments, prog_name="microedit")


class _Root(TyperGroup):
    """Imports a sub-command when it is asked for, so that one asked for pays for no other."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(_command_entries())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = _command_entries().get(cmd_name)
        return None if entry is None else _load(entry)

    def invoke(self, ctx: Any) -> Any:
        # Here and not only in main(): typer swallows KeyboardInterrupt above this point.
        with _one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(cls=_Root, no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"microedit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Knowledge edits for large language models: trained here, served inside vLLM."""


def _command_entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in (*entry_points(group=COMMANDS), *OWN_COMMANDS)}


def _load(entry: EntryPoint) -> Any:
    """The sub-command; one that explains itself where the module cannot be imported."""
    try:
        loaded = entry.load()
    except Exception as error:
        return _unavailable(entry.name, error)
    if isinstance(loaded, typer.Typer):
        command: Any = typer.main.get_group(loaded)
    else:
        single = typer.Typer(add_completion=False)
        single.command(entry.name)(loaded)
        command = typer.main.get_command(single)
    command.name = entry.name
    return command


def _unavailable(name: str, error: Exception) -> Any:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    accept_anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    stub = typer.Typer(add_completion=False)

    @stub.command(name, help=f"Not available: {reason}", context_settings=accept_anything)
    def refuse() -> None:
        raise MicroEditError(f"the sub-command {name!r} is not available ({reason})")

    return typer.main.get_command(stub)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except MicroEditError as error:
        _stop(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _stop("disk is full", 2)


def _stop(message: str, status: int) -> None:
    print(f"microedit: {message}", file=sys.stderr)
    sys.exit(status)
