"""What an engine made of the golden prompts, compared with what it must make of them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from microedit_vllm.artifact import EditSet, GoldenPrompt, Misreading
from microedit_vllm.errors import MicroEditError

FindingName = Literal[
    Misreading,
    "patch_never_ran",
    "decisions_unknown",
    "ard_differs",
    "switch_differs",
    "edit_not_applied",
    "edited_answers_differ",
    "plain_answers_differ",
]
MISREADINGS: dict[Misreading, str] = {
    "layer_before": "z is read one layer too early",
    "layer_after": "z is read one layer too late",
    "hidden_states_alone": "z is read before the residual is summed: from hidden_states alone",
    "residual_alone": "z is read before the residual is summed: from the residual alone",
}
# One ARD is infinite, the other is not: farther apart than any two numbers that occur.
_APART = 10.0


@dataclass(frozen=True)
class Tolerance:
    """How far rounding may move an engine from the trainer.

    Attributes:
        mean, worst: |ln(ARD found / ARD expected)|, over all prompts and of any one.
        answers: share of the clear answers that must be equal.
    """

    mean: float
    worst: float
    answers: float


# Measured between transformers and vLLM (`benchmarks/agreement.py`): in fp32 ARD within 0.1% and
# every answer equal; in bf16 ARD off by 1.7% in the mean, 96% of all answers equal.
FULL = Tolerance(mean=0.005, worst=0.02, answers=1.0)
HALF = Tolerance(mean=0.05, worst=0.2, answers=0.8)


def tolerance(*dtypes: str) -> Tolerance:
    """For the dtypes of the two sides that are compared, "float32" or shorter ones."""
    return FULL if set(dtypes) == {"float32"} else HALF


@dataclass(frozen=True)
class Observation:
    """What an engine made of one golden prompt.

    Attributes:
        ard: None where nothing was scored, or no decision is known.
        on: None where no decision is known.
        edited, plain: greedy tokens with the set and with edits off, `num_tokens` of the prompt.
    """

    ard: float | None
    on: bool | None
    edited: tuple[int, ...]
    plain: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it must be; `message` is one line for a person."""

    name: FindingName
    message: str


@dataclass(frozen=True)
class Report:
    """Everything that one verification found.

    Attributes:
        prompts, observations: side by side.
        deviations: mean |ln| of the ARDs found against the right ones ("right") and against those
            of each misreading; empty where no decision is known.
        findings: empty where the engine does as the trainer does.
    """

    prompts: tuple[GoldenPrompt, ...]
    observations: tuple[Observation, ...]
    deviations: dict[str, float]
    findings: list[Finding]

    @property
    def line(self) -> str:
        """All of it in one line for a person."""
        if self.findings:
            return "; ".join(f"{finding.name}: {finding.message}" for finding in self.findings)
        return (
            f"{len(self.prompts)} golden prompts as the trainer computed them "
            f"(ARD off by {self.deviations['right']:.2%} in the mean)"
        )

    def to_json(self) -> dict[str, Any]:
        """What `microedit verify --json` prints."""
        pairs = zip(self.prompts, self.observations, strict=True)
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "deviations": self.deviations,
            "prompts": [{"expected": p.model_dump(), "found": asdict(o)} for p, o in pairs],
        }


def golden_prompts_of(edit_set: EditSet) -> tuple[GoldenPrompt, ...]:
    """The prompts to send.

    Raises:
        MicroEditError: the set has none.
    """
    if not edit_set.golden_prompts:
        raise MicroEditError(
            "the edit set has no golden prompts: an older release made it; "
            "make it again with `microedit edit`"
        )
    return edit_set.golden_prompts


def num_tokens(prompt: GoldenPrompt) -> int:
    """How many tokens to ask for."""
    return max(len(prompt.edited), len(prompt.plain), 1)


def compare(edit_set: EditSet, observations: Sequence[Observation], dtype: str) -> Report:
    """Compare and name what is wrong: of one chain of causes and effects, the first only.

    Args:
        observations: one for each of the set's golden prompts, in order.
        dtype: what the engine computes in.

    Raises:
        MicroEditError: the set has no golden prompts.
    """
    prompts = golden_prompts_of(edit_set)
    allowed = tolerance(dtype, edit_set.manifest.model.dtype)
    pairs = list(zip(prompts, observations, strict=True))
    decided = [(p, o) for p, o in pairs if o.on is not None]
    deviations = _deviations(decided)
    edit = (
        _patch_finding(pairs)
        or _ard_finding(decided, deviations, allowed)
        or _switch_finding(decided)
        or _edited_answers_finding(pairs, allowed)
    )
    findings = [finding for finding in (_plain_finding(pairs, allowed), edit) if finding]
    return Report(prompts, tuple(observations), deviations, findings)


_Pairs = Sequence[tuple[GoldenPrompt, Observation]]


def _patch_finding(pairs: _Pairs) -> Finding | None:
    unscored = [o for p, o in pairs if p.ard is not None and o.ard is None]
    if len(unscored) == sum(p.ard is not None for p, _ in pairs) > 0:
        return Finding(
            "patch_never_ran",
            f"the patch never ran: nothing was scored on any of {len(unscored)} prompts",
        )
    unknown = sum(o.on is None for _, o in pairs)
    if unknown:
        message = f"no decision is known for {unknown} of {len(pairs)} prompts; verify again"
        return Finding("decisions_unknown", message)
    return None


def _distance(found: float | None, wanted: float | None) -> float:
    if found is None or wanted is None:
        return 0.0 if found is wanted else _APART
    return min(abs(math.log(max(found, 1e-6) / max(wanted, 1e-6))), _APART)


def _deviations(decided: _Pairs) -> dict[str, float]:
    """Means over the prompts; a misreading counts where every prompt knows its ARD."""
    if not decided:
        return {}
    wanted = {"right": [p.ard for p, _ in decided]}
    for name in MISREADINGS:
        if all(name in p.misread for p, _ in decided):
            wanted[name] = [p.misread[name] for p, _ in decided]
    return {
        name: sum(_distance(o.ard, w) for (_, o), w in zip(decided, ards, strict=True))
        / len(decided)
        for name, ards in wanted.items()
    }


def _ard_finding(
    decided: _Pairs, deviations: dict[str, float], allowed: Tolerance
) -> Finding | None:
    worst = max((_distance(o.ard, p.ard) for p, o in decided), default=0.0)
    right = deviations.get("right", 0.0)
    if right <= allowed.mean and worst <= allowed.worst:
        return None
    nearest = min(deviations, key=deviations.__getitem__)
    off = f"the ARD is off by {right:.1%} in the mean, {worst:.1%} at worst (ln)"
    # Another model is off as well, and always nearer to one place than to the others.
    for name, said in MISREADINGS.items():
        if name == nearest and deviations[name] <= allowed.worst and right > 2 * deviations[name]:
            return Finding(
                name, f"{said}: {off}, and by {deviations[name]:.1%} from what is found there"
            )
    return Finding(
        "ard_differs",
        f"{off}, and no known misreading explains it; serve the model that was edited, in its "
        "dtype and unquantised, or name the served dtype with --dtype",
    )


def _switch_finding(decided: _Pairs) -> Finding | None:
    wrong = sum(o.on != p.on for p, o in decided)
    if not wrong:
        return None
    message = f"the switch decides otherwise on {wrong} of {len(decided)} prompts, at the same ARD"
    return Finding("switch_differs", message)


def _edited_answers_finding(pairs: _Pairs, allowed: Tolerance) -> Finding | None:
    asked = [(p, o) for p, o in pairs if p.on and p.edited]
    wrong = [o for p, o in asked if not is_answered(o.edited, p.edited)]
    if len(wrong) <= (1 - allowed.answers) * len(asked):
        return None
    many = f"{len(wrong)} of {len(asked)} prompts"
    if all(o.edited == o.plain for o in wrong):
        return Finding(
            "edit_not_applied",
            f"the switch is on, and z is not replaced: on {many} the answer is the plain one",
        )
    return Finding("edited_answers_differ", f"the edited answer is another on {many}")


def _plain_finding(pairs: _Pairs, allowed: Tolerance) -> Finding | None:
    asked = [(p, o) for p, o in pairs if p.plain]
    wrong = sum(not is_answered(o.plain, p.plain) for p, o in asked)
    if wrong <= (1 - allowed.answers) * len(asked):
        return None
    return Finding(
        "plain_answers_differ",
        f"with edits off the answer is another on {wrong} of {len(asked)} prompts: this is not "
        "the model that was edited, or not in its dtype",
    )


def is_answered(found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether the found tokens begin with the wanted ones."""
    return tuple(found[: len(wanted)]) == tuple(wanted)
