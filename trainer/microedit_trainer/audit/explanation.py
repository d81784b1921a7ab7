"""What is known about one prompt and one edit set: plain values, for text, JSON and picture."""

from dataclasses import asdict, dataclass
from typing import Any

from microedit_trainer.contexts import ContextName


@dataclass(frozen=True)
class Token:
    """One token of the prompt.

    Attributes:
        scored: in the scope that the switch looks at; a sink there does not count all the same.
        ratio: its distance divided by dist0 (relative) or by α (absolute): what it would have for
            an ARD alone. None where that is no number.
        run_ard: ARD of the run of counted tokens that ends here; None where none does.
        decides: part of the run with the smallest ARD.
        changed: how many of its top k latents the scoring change has rows for.
    """

    position: int
    id: int
    text: str
    scored: bool
    sink: bool
    ratio: float | None
    run_ard: float | None
    decides: bool
    changed: int


@dataclass(frozen=True)
class RowShare:
    """A fact (from 1, in the set's order) and its share of a row's activation, over all facts."""

    fact: int
    prompt: str
    share: float


@dataclass(frozen=True)
class Row:
    """A changed decoder row that fires.

    Attributes:
        activation: Σ h over the tokens that are looked at.
        strength: activation · ‖ΔW‖.
        share: of the strength of all changed rows that fire.
        facts: whose own tokens activate it most, the largest share first.
    """

    latent: int
    activation: float
    strength: float
    share: float
    facts: tuple[RowShare, ...] = ()


@dataclass(frozen=True)
class Latent:
    """One of the top k, with Σ h over the tokens that are looked at."""

    latent: int
    activation: float
    changed: bool


@dataclass(frozen=True)
class Firing:
    """What one of the set's changes does at some of the prompt's tokens.

    Attributes:
        positions: the tokens that are looked at.
        rows_total: rows that the change has.
        rows_firing: of these, how many fire at one of the tokens at least.
        latents: latents among the top k of one of the tokens at least.
        changed_of_top_k: how many of a token's top k are changed rows, in the mean.
        strongest: the largest activations of the top k, changed or not.
        rows: the changed rows of the largest strength.
    """

    positions: tuple[int, ...]
    rows_total: int
    rows_firing: int
    latents: int
    changed_of_top_k: float
    strongest: tuple[Latent, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class NearFact:
    """An edited fact beside the prompt.

    Attributes:
        fact: its number in the set, from 1.
        overlap: cosine of what its own tokens and the prompt's deciding tokens draw from the
            scoring change's rows, row by row (activation · ‖ΔW‖).
        edit_overlap: the same of the edit change's rows, at e of both.
        ard: its own, as the set stores it.
    """

    fact: int
    prompt: str
    target: str
    overlap: float
    edit_overlap: float
    ard: float | None


@dataclass(frozen=True)
class Explanation:
    """Everything that `microedit explain` says.

    Attributes:
        ard: the decision's statistic; None where nothing is scored.
        decision_position: e, the last token of the prompt.
        top_k: latents kept per token.
        scoring, edit: at the deciding run, and at e.
        carried: at the scored tokens that carry something to e; None where the set has no carried
            change.
        nearest: the facts of the largest overlap, first the nearest; none where it is 0.
        facts_compared, facts_total: the first of the set's facts were compared.
        before, after: greedy answers without the edit and with what the switch decides.
    """

    edit_set: str
    model: str
    layer: int
    context: ContextName
    prompt: str
    system: str | None
    statistic: str
    alpha: float | None
    tau: float
    ard: float | None
    on: bool
    decision_position: int
    top_k: int
    tokens: tuple[Token, ...]
    scoring: Firing
    edit: Firing
    carried: Firing | None
    nearest: tuple[NearFact, ...]
    facts_compared: int
    facts_total: int
    before: str
    after: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
