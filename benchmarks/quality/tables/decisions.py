"""What the switch decides by: other statistics of the distances that its kernel has anyway."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.ordinary import count_fires
from benchmarks.quality.experiment import Experiment, alpha_of
from benchmarks.quality.figures import SCORES_HEADER, percent, score, scores
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import in_words
from benchmarks.quality.store import Figures
from benchmarks.quality.tables.experiments import main_experiments
from benchmarks.quality.tables.ordinary import traffic
from microedit_trainer.evaluation import TorchEngine, evaluate
from microedit_vllm.artifact import EditOperator

NAME = "decisions"
TEXT = """
The joint sets of 100 and 300 facts, decided by other statistics of what the kernel has for each
scored token, ‖ẑ − z‖² with the scoring change and ‖ẑ₀ − z‖² without. Each is the smallest over the
same runs of tokens, and each has a τ of its own, calibrated on the same prompts by the same rules.
α is the SAE's mean ‖ẑ₀ − z‖². *as shipped* is the row of the main table. The last three are
measured among the fewer facts alone.
"""
HEADER = (
    *("facts", "decides by", *SCORES_HEADER, "chat Rel", "chat Gen"),
    *("on: edited", "paraphrases", "ordinary, of 1,000", "τ"),
)
# Of the runs of a sequence: ‖ẑ − z‖² and ‖ẑ₀ − z‖², [R, r] each, and α → [R].
Statistic = Callable[[Tensor, Tensor, float], Tensor]


def relative(dist: Tensor, dist0: Tensor, alpha: float) -> Tensor:
    """Σ‖ẑ − z‖² / Σ‖ẑ₀ − z‖²."""
    return dist.sum(-1) / dist0.sum(-1)


def absolute(dist: Tensor, dist0: Tensor, alpha: float) -> Tensor:
    """The paper's: Eq. 13."""
    return dist.mean(-1) / alpha


def gain(dist: Tensor, dist0: Tensor, alpha: float) -> Tensor:
    """By how much the change brings ẑ nearer, in α: 1 where it does nothing, as `relative`."""
    return 1 - (dist0 - dist).mean(-1) / alpha


def mean_ratio(dist: Tensor, dist0: Tensor, alpha: float) -> Tensor:
    """Every token counts alike, however far its ẑ₀ is."""
    return (dist / dist0).mean(-1)


def geometric_ratio(dist: Tensor, dist0: Tensor, alpha: float) -> Tensor:
    """As `mean_ratio`; one token that is reconstructed well counts for more."""
    return (dist / dist0).log().mean(-1).exp()


def worst_ratio(dist: Tensor, dist0: Tensor, alpha: float) -> Tensor:
    """Every token of the run must be reconstructed."""
    return (dist / dist0).amax(-1)


SHIPPED = "as shipped: Σ‖ẑ − z‖² / Σ‖ẑ₀ − z‖²"
STATISTICS: dict[str, Statistic] = {
    SHIPPED: relative,
    "mean of ‖ẑ − z‖² / α (the paper)": absolute,
    "1 − mean of (‖ẑ₀ − z‖² − ‖ẑ − z‖²) / α": gain,
    "mean of ‖ẑ − z‖² / ‖ẑ₀ − z‖²": mean_ratio,
    "geometric mean of ‖ẑ − z‖² / ‖ẑ₀ − z‖²": geometric_ratio,
    "largest ‖ẑ − z‖² / ‖ẑ₀ − z‖²": worst_ratio,
}
AMONG_MORE = (relative, absolute, gain)


@dataclass(frozen=True)
class DecidingOperator(EditOperator):
    """An edit set that decides by a statistic of ours. See `EditOperator`."""

    statistic: Statistic
    alpha: float

    @classmethod
    def of(cls, operator: EditOperator, statistic: Statistic) -> "DecidingOperator":
        """The same set, deciding by this."""
        own = {field.name: getattr(operator, field.name) for field in fields(operator)}
        return cls(**own, statistic=statistic, alpha=alpha_of(operator.sae))

    def ard(self, dist: Tensor, dist0: Tensor) -> Tensor:
        """The statistic of one sequence: two [S] → scalar."""
        decision = self.edit_set.manifest.decision
        if len(dist) < decision.min_tokens:
            return torch.full((), torch.inf)
        size = min(decision.scope.run or len(dist), len(dist))
        runs = dist.float().unfold(0, size, 1), dist0.float().unfold(0, size, 1)
        return self.statistic(*runs, self.alpha).min()

    def with_tau(self, tau: float) -> "DecidingOperator":
        """The same with another τ."""
        manifest = self.edit_set.manifest
        decision = manifest.decision.model_copy(update={"tau": tau})
        found = manifest.model_copy(update={"decision": decision})
        return replace(self, edit_set=replace(self.edit_set, manifest=found))


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    lines = []
    experiments = main_experiments(plan)
    for experiment in (experiments["some"], experiments["more"]):
        for name, statistic in STATISTICS.items():
            if experiment is not experiments["some"] and statistic not in AMONG_MORE:
                continue
            lab.say(f"decisions: {in_words(experiment.facts)}, {name}")
            kind = f"{NAME}-{statistic.__name__}"
            found = lab.row(kind, experiment, partial(decided, lab, experiment, statistic))
            lines.append([in_words(experiment.facts), name, *_cells(found)])
    return Section(NAME, "What decides", TEXT, HEADER, lines)


def decided(lab: Lab, experiment: Experiment, statistic: Statistic) -> Figures:
    """The experiment's set with another statistic: τ, scores, ordinary traffic."""
    engine, split = lab.engine(experiment), lab.split(experiment)
    operator = DecidingOperator.of(engine.operator, statistic)
    engine = TorchEngine(engine.lm, operator, engine.store)
    calibration = lab.run(experiment).calibrate(engine, split.edited)
    engine = replace(engine, operator=operator.with_tau(calibration.tau))
    figures: Figures = {"tau": calibration.tau}
    contexts = lab.contexts(experiment)
    for name in contexts.names:
        found = evaluate(engine, contexts, split.edited, split.near, name, split.subjects)
        figures[name] = asdict(found)
    return {**figures, "ordinary": count_fires(engine, traffic(lab, experiment))["fires"]}


def _cells(found: Figures) -> list[str]:
    bare, chat = found["bare"], found.get("chat", {})
    cells = [*scores(bare), score(chat.get("rel")), score(chat.get("gen"))]
    cells += [percent(bare["fire_edit"]), percent(bare["fire_para"])]
    return [*cells, str(found["ordinary"]), f"{found['tau']:.3f}"]
