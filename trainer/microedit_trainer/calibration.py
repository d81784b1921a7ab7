"""τ from prompts that are not scored: as large as false fires allow."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

# JSON has no infinity; an ARD that large never switches on.
LARGE = 1e6


@dataclass(frozen=True)
class Calibration:
    """A chosen τ and what it rests on.

    Attributes:
        tau: the switch is on where ARD ≤ tau.
        margin_edited: tau minus the 99th percentile of the edited prompts' ARD; negative where
            edited prompts stay off.
        margin_unrelated: the smallest ARD of an ordinary prompt minus tau.
        prompts, fires: per group of calibration prompts, how many there were and the share of
            them that switches on at tau.
    """

    tau: float
    margin_edited: float
    margin_unrelated: float
    prompts: dict[str, int]
    fires: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NearPrompts:
    """ARDs [N] of prompts of the facts' own kind that were never edited, and the share of them
    that may switch on."""

    ards: Tensor
    allowed: float


def slack_for(facts: int) -> float:
    """How far τ of so many facts stays below the smallest ARD of the ordinary prompts, as a factor.

    These prompts are few, and more facts change more rows that others activate. Measured on 1,000
    others, SAE of k = 32: at 100 facts 3 switch on with 0.97, 1 with 0.96, none with 0.95 or less;
    97% of the paraphrases do with 0.97 to 0.94, 95% with 0.93. At 300 facts none does with 0.93.
    """
    return max(0.93, 0.95 - 0.0001 * facts)


def calibrate(
    edited: Tensor,
    ordinary: Tensor,
    near: dict[str, NearPrompts],
    slack: float,
    ordinary_rate: float = 0.0,
    fixed: float | None = None,
) -> Calibration:
    """Choose the largest τ that the calibration prompts allow.

    Of the ordinary prompts at most the share `ordinary_rate` may switch on, with τ at most
    `slack` × the smallest ARD among the others; of each group of near prompts at most the share
    that it allows.

    Args:
        edited, ordinary: ARDs, [N] fp32; +∞ where nothing could be scored.
        near: by name; a group may be empty.
        fixed: this τ instead, with the margins and shares that it has.
    """
    tolerated = int(ordinary_rate * len(ordinary))
    bounds = [slack * _finite(ordinary.sort().values[tolerated])]
    for group in near.values():
        allowed = int(group.allowed * len(group.ards))
        if allowed < len(group.ards):
            # Just below the first near prompt that must stay off.
            bounds.append(_finite(group.ards.sort().values[allowed]) * (1 - 1e-6))
    tau = max(min(bounds), 1e-6) if fixed is None else fixed
    groups = {"edited": edited, "ordinary": ordinary} | {n: g.ards for n, g in near.items()}
    groups = {name: ards for name, ards in groups.items() if len(ards)}
    return Calibration(
        tau=tau,
        margin_edited=tau - float(edited.clamp(max=LARGE).quantile(0.99)),
        margin_unrelated=_finite(ordinary.min()) - tau,
        prompts={name: len(ards) for name, ards in groups.items()},
        fires={name: float((ards <= tau).float().mean()) for name, ards in groups.items()},
    )


def _finite(ard: Tensor) -> float:
    return float(ard.clamp(max=LARGE))
