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

if TYPE_CHECKING:
    from microedit_trainer.evaluation import Engine
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
    from microedit_trainer.edit_run import prompt_digest
    from microedit_trainer.evaluation import evaluate as score
    from microedit_trainer.facts import read_facts
    from microedit_trainer.language_model import LanguageModel
    from microedit_vllm.artifact import EditSet, fingerprint_model

    edit_set = EditSet.load(edits)
    records = read_facts(data)
    facts = records[: limit or edit_set.manifest.facts]
    # Any JSON may stand there: neither is checked when a set is loaded.
    known = {str(fact.get("prompt")) for fact in edit_set.facts}
    held_out = edit_set.manifest.hyperparameters.get("held_out")
    used = set(map(str, held_out)) if isinstance(held_out, list) else set()
    rest = read_facts(near) if near else records[len(facts) :]
    others = [f for f in rest if f.prompt not in known and prompt_digest(f.prompt) not in used]
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
