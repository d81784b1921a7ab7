"""What an edit set makes of each way of asking."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from benchmarks.context_bench.asking import Case
from benchmarks.wilson import wilson_interval
from microedit_trainer.evaluation import Outcome, TorchEngine
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.residual_store import ResidualStore
from microedit_vllm.artifact import EditOperator


@dataclass(frozen=True)
class Row:
    """One case under one edit set.

    Attributes:
        right: share of answer tokens that are the new answer's, under teacher forcing; for
            prompts about nothing edited the share that is as without the edit set.
        exact: share of prompts with every answer token right.
        fires: how many of the prompts switch on.
        interval: Wilson's 95% interval of the share that does.
    """

    name: str
    context: str
    edited: bool
    prompts: int
    right: float
    exact: float
    fires: int
    interval: tuple[float, float]

    @property
    def fire_rate(self) -> float:
        return self.fires / self.prompts

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"fire_rate": self.fire_rate}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Row":
        """The row that `to_json` told."""
        own = {field.name: found[field.name] for field in fields(cls)}
        return cls(**{**own, "interval": tuple(own["interval"])})


def measure(
    lm: LanguageModel,
    operators: Sequence[EditOperator],
    cases: Sequence[Sequence[Case]],
    progress: Callable[[int], None],
) -> list[list[Row]]:
    """Every case under every edit set.

    Args:
        operators: of sets on the same layer.
        cases: by set, the same cases in the same order; the scored spans differ by the set's scope.
        progress: called with the number of prompts done since its last call.

    Returns:
        by set, a row for each case that has prompts.
    """
    rows: list[list[Row]] = [[] for _ in operators]
    # The layers below the cut run once per case, whatever scores the result.
    manifest = operators[0].edit_set.manifest
    store = ResidualStore(lm, manifest.layer, manifest.decision.max_norm)
    for same in zip(*cases, strict=True):
        for operator, case, own in zip(operators, same, rows, strict=True):
            if case.prompts:
                own.append(_row(TorchEngine(lm, operator, store), case))
                progress(len(case.prompts))
    return rows


def _row(engine: TorchEngine, case: Case) -> Row:
    outcomes = engine.edited(case.prompts)
    if case.edited:
        wanted = [torch.tensor(p.answer_ids) for p in case.prompts]
    else:
        wanted = engine.plain(case.prompts)
    shares = _shares(outcomes, wanted)
    fires = sum(outcome.on for outcome in outcomes)
    return Row(
        name=case.name,
        context=case.context,
        edited=case.edited,
        prompts=len(case.prompts),
        right=float(shares.mean()),
        exact=float((shares == 1).float().mean()),
        fires=fires,
        interval=wilson_interval(fires, len(case.prompts)),
    )


def _shares(outcomes: Sequence[Outcome], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    same = [(o.answer == w).float().mean() for o, w in zip(outcomes, wanted, strict=True)]
    return torch.stack(same)
