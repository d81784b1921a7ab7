"""`microedit eval`: Rel, Gen, Loc and near of an edit set."""

import json
import tempfile
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from microedit_vllm.errors import MicroEditError

if TYPE_CHECKING:
    from microedit_trainer.evaluation import Engine
    from microedit_trainer.facts import Fact
    from microedit_trainer.language_model import LanguageModel
    from microedit_vllm.artifact import EditSet

NEAR_LIMIT = 200


class EngineName(StrEnum):
    hf = "hf"
    vllm = "vllm"


class Context(StrEnum):
    bare = "bare"
    chat = "chat"
    long = "long"


def evaluate(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    edits: Annotated[Path, typer.Option(help="Edit set.")],
    data: Annotated[Path, typer.Option(help="Facts file: the edited facts first, then others.")],
    sae: Annotated[Path | None, typer.Option(help="SAE folder, when it was moved.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Ask in this language, where records have several (de).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first N facts.")] = None,
    near: Annotated[
        Path | None, typer.Option(help="Other records for `near`; default: the rest of --data.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="Who runs the model.")] = EngineName.hf,
    context: Annotated[Context, typer.Option(help="How prompts are asked.")] = Context.bare,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Score an edit set by token accuracy under teacher forcing."""
    from microedit_trainer.contexts import Contexts
    from microedit_trainer.evaluation import evaluate as score
    from microedit_trainer.language_model import LanguageModel
    from microedit_vllm.artifact import EditSet, fingerprint_model

    edit_set = EditSet.load(edits)
    facts, others = _records(edit_set, data, near, limit, language)
    lm = LanguageModel.load(model, dtype)
    edit_set.check_model(fingerprint_model(lm.folder), model)
    lm.check_layer(edit_set.manifest.layer)
    decision = edit_set.manifest.decision
    contexts = Contexts(lm.tokenizer, decision.scope, decision.turn, lm.max_length)
    with ExitStack() as stack:
        runner = _engine(engine, lm, edit_set, edits, sae, stack)
        scores = score(runner, contexts, facts, others[:NEAR_LIMIT], context.value)
    result: dict[str, Any] = {
        **scores.to_json(),
        "tau": decision.tau,
        "engine": engine.value,
        "seconds_per_edit": edit_set.manifest.scores.get("seconds_per_edit"),
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print(result)


def _records(
    edit_set: "EditSet", data: Path, near: Path | None, limit: int | None, language: str | None
) -> tuple[list["Fact"], list["Fact"]]:
    """The edited facts, and others that were neither edited nor held out to calibrate τ."""
    from microedit_trainer.facts import prompt_digest, read_facts

    # Any JSON may stand there: neither is checked when a set is loaded.
    known = {str(fact.get("prompt")) for fact in edit_set.facts}
    parameters = edit_set.manifest.hyperparameters
    digests = parameters.get("held_out")
    used = set(map(str, digests)) if isinstance(digests, list) else set()
    own = parameters.get("language")
    edited_in = own if isinstance(own, str) else None

    def read(path: Path) -> list[tuple[str, "Fact"]]:
        """Each record's prompt as the set knows it, and the fact as it shall be asked."""
        prompts = [fact.prompt for fact in read_facts(path, language=edited_in)]
        return list(zip(prompts, read_facts(path, language=language or edited_in), strict=True))

    def held_out(prompt: str) -> bool:
        return prompt not in known and prompt_digest(prompt) in used

    records = read(data)
    count = limit or edit_set.manifest.facts
    skipped = sum(held_out(prompt) for prompt, _ in records[:count])
    records = [(prompt, fact) for prompt, fact in records if not held_out(prompt)]
    if not records:
        raise MicroEditError(f"all records of {data} were held out to calibrate τ; none was edited")
    if skipped:
        typer.echo(
            f"microedit: {skipped} of the first {count} records of {data} were held out to "
            "calibrate τ and never edited; they are not scored",
            err=True,
        )
    rest = read(near) if near else records[count:]
    others = [fact for prompt, fact in rest if prompt not in known and not held_out(prompt)]
    return [fact for _, fact in records[:count]], others


def _engine(
    name: EngineName,
    lm: "LanguageModel",
    edit_set: "EditSet",
    folder: Path,
    sae: Path | None,
    stack: ExitStack,
) -> "Engine":
    if name is EngineName.hf:
        from microedit_trainer.evaluation import TorchEngine

        return TorchEngine.load(lm, edit_set, folder, sae)
    from microedit_trainer.demo.server import VllmServer
    from microedit_trainer.server_engine import ServerEngine

    log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
    arguments = ["--microedit", str(folder), "--enforce-eager"]
    if sae is not None:
        arguments += ["--microedit-sae", str(sae)]
    arguments += edit_set.manifest.serve_flags
    server = stack.enter_context(VllmServer(lm.folder, arguments, log=log))
    return ServerEngine.connect(server.base_url)


def _print(result: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in result.items():
        shown = f"{value:.3f}" if isinstance(value, float) else "-" if value is None else str(value)
        table.add_row(name, shown)
    Console().print(table)
