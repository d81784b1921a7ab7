"""The option `--config`: defaults for a command's other options, from a name or a JSON file."""

from collections.abc import Callable

import typer

from microedit_trainer.run_config import RunConfig, shipped_configs
from microedit_vllm.errors import MicroEditError


def config_option(section: str) -> typer.models.OptionInfo:
    """The option for a command that takes its defaults from `section` ("edit" or "train").

    What is given on the command line wins over the config.
    """
    return typer.Option(
        "--config",
        metavar="NAME|FILE",
        is_eager=True,  # before the options that it is the default of
        callback=_takes_defaults_from(section),
        help=f"Defaults for the other options: {', '.join(shipped_configs())}, or a JSON file.",
    )


def _takes_defaults_from(section: str) -> Callable[[typer.Context, str | None], str | None]:
    def callback(ctx: typer.Context, value: str | None) -> str | None:
        if value is None:
            return None
        config = RunConfig.find(value)
        options = {**config.sae, **config.train} if section == "train" else config.edit
        known = [p.name for p in ctx.command.params if p.name not in (None, "config", "help")]
        for name in options:
            if name not in known:
                raise MicroEditError(
                    f"config {value}: {section}: {name} is no option of {ctx.command_path}"
                )
        ctx.default_map = options
        return value

    return callback
