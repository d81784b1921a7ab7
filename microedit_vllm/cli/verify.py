"""`microedit verify`: golden prompts sent to a server, or to vLLM offline."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from microedit_vllm.artifact import EditSet
from microedit_vllm.errors import MicroEditError
from microedit_vllm.verification.comparison import (
    Observation,
    Report,
    golden_prompts_of,
    is_answered,
)

if TYPE_CHECKING:
    from microedit_vllm.artifact import GoldenPrompt

MISSING = "-"
# No more memory than a few prompts need, and nothing of vLLM's between the lines of the report.
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def verify(
    edit_set: Annotated[Path, typer.Argument(metavar="SET", help="Folder of the edit set.")],
    url: Annotated[str | None, typer.Option(help="A running server, http://HOST:PORT.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id, to run vLLM here instead.")
    ] = None,
    sae: Annotated[
        Path | None, typer.Option(help="SAE folder, when it was moved; with --model.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="What is served in, when it is not the set's dtype.")
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="VLLM_API_KEY", help="The server's API key.")
    ] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Prove that an engine reads z where the edit set was trained on it.

    Ends with status 0 where everything is as the trainer computed it, 1 where something is not.
    """
    if (url is None) == (model is None):
        raise MicroEditError("name either --url, a running server, or --model, to run vLLM here")
    if url is not None and sae is not None:
        raise MicroEditError("--sae goes with --model; a server has its SAE already")
    loaded = EditSet.load(edit_set)
    report = (
        _ask_server(url, loaded, dtype, api_key)
        if url is not None
        else _ask_engine(str(model), edit_set, loaded, sae, dtype)
    )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print(report)
    if report.findings:
        raise typer.Exit(1)


def _ask_server(url: str, edit_set: EditSet, dtype: Dtype | None, api_key: str) -> Report:
    from microedit_vllm.served_model import ServedModel
    from microedit_vllm.verification.server import verify_server

    golden_prompts_of(edit_set)
    return verify_server(ServedModel.connect(url, api_key), edit_set, dtype)


def _ask_engine(
    model: str, folder: Path, edit_set: EditSet, sae: Path | None, dtype: Dtype | None
) -> Report:
    prompts = golden_prompts_of(edit_set)
    # Before vLLM is imported.
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from microedit_vllm.engine.golden_prompts import verification_engine, verify_llm

    served = edit_set.manifest.model.dtype if dtype is None else dtype.value
    with verification_engine(model, folder, sae, prompts, served) as llm:
        return verify_llm(llm, edit_set, served)


def _print(report: Report) -> None:
    console = Console()
    table = Table(title="Golden prompts: expected, found")
    for name in ("", "tokens", "ARD", "switch", "edited answer", "plain answer"):
        table.add_column(name, justify="right")
    rows = zip(report.prompts, report.observations, strict=True)
    for number, (prompt, found) in enumerate(rows, start=1):
        table.add_row(str(number), *_cells(prompt, found))
    console.print(table)
    console.print(escape(report.line), style="red" if report.findings else None)


def _cells(prompt: "GoldenPrompt", found: Observation) -> list[str]:
    return [
        str(len(prompt.token_ids)),
        f"{_number(prompt.ard)}, {_number(found.ard)}",
        f"{_switch(prompt.on)}, {_switch(found.on)}",
        _same(found.edited, prompt.edited),
        _same(found.plain, prompt.plain),
    ]


def _number(ard: float | None) -> str:
    return MISSING if ard is None else f"{ard:.3f}"


def _switch(on: bool | None) -> str:
    return MISSING if on is None else "on" if on else "off"


def _same(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """A prompt whose first answer token is not clear has nothing to compare."""
    if not wanted:
        return MISSING
    return "same" if is_answered(found, wanted) else "another"
