"""Edit sets to ask: given ones, or one for each decision scope, made from the same targets."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.facts import Fact
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.solvers import JointSolver
from microedit_vllm.artifact import EditSet, Scope, SparseAutoencoder
from microedit_vllm.errors import MicroEditError


def read_scope(text: str) -> Scope:
    """ "64,16": the last 64 tokens, runs of 16. "turn,8": the whole turn; a run of 0 is all of it.

    Raises:
        MicroEditError: anything else.
    """
    found = re.fullmatch(r"(turn|[1-9]\d*),(\d+)", text.replace(" ", ""))
    if not found:
        raise MicroEditError(
            f"--scope {text}: write how many tokens are looked at, or turn, a comma, and the "
            "length of a run, like 64,16 or turn,0"
        )
    last, run = found.groups()
    return Scope(last=None if last == "turn" else int(last), run=int(run))


def make_set(
    lm: LanguageModel,
    sae_folder: Path,
    scope: Scope,
    facts: Sequence[Fact],
    hold_out: Sequence[Fact],
    out: Path,
    progress: Callable[[int], None],
) -> EditSet:
    """A jointly solved set in `out`; the facts' targets stay beside it for the next scope."""
    settings = EditSettings(
        solver=JointSolver(), scope=scope, hold_out=hold_out, targets=out.parent / "targets"
    )
    sae = SparseAutoencoder.load(sae_folder)
    return EditRun(lm, sae, sae_folder, settings).edit(facts, out, progress)


def facts_of(edit_set: EditSet) -> list[Fact]:
    """What a set was made from, as far as it tells."""
    return [Fact(f["prompt"], f["target"], f.get("subject")) for f in edit_set.facts]
