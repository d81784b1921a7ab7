"""`microedit.json`: everything about an edit set that is not a tensor."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from microedit_vllm.errors import MicroEditError

# Sets with a carried change are of the second version: older releases would serve them without.
FORMAT_VERSION, CARRYING_VERSION = 1, 2
# Position "sequence" needs each prompt whole in one step, and every token of it computed.
SEQUENCE_FLAGS = ("--no-enable-chunked-prefill", "--no-enable-prefix-caching")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelIdentity(_Part):
    """The base model that the set was made for."""

    name: str
    fingerprint: str
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    dtype: str


class SaeIdentity(_Part):
    """The SAE that the set builds on; `path` is where it was, relative to the set's folder."""

    path: str
    fingerprint: str
    num_latents: int = Field(gt=0)
    k: int = Field(gt=0)


class Scope(_Part):
    """Which tokens are scored: `last` before the decision (None: all of them), and within them
    the smallest ARD over runs of `run` consecutive scored tokens (0: all as one run)."""

    # Shorter runs see more misspelt questions, and more of what no edit is about: among 300 facts
    # runs of 8 let 5 of 1,000 ordinary requests through where these let 2.
    last: int | None = Field(default=64, gt=0)
    run: int = Field(default=16, ge=0)

    def __str__(self) -> str:
        span = "all" if self.last is None else f"last:{self.last}"
        return f"window:{self.run} in {span}" if self.run else span


class TurnMarkers(_Part):
    """Token ids that open a user's turn and that close it in front of the model's answer."""

    start: list[int]
    end: list[int]


class Decision(_Part):
    """What turns the switch on: ARD ≤ tau over the scored tokens."""

    statistic: Literal["relative", "absolute"]
    tau: float = Field(gt=0)
    alpha: float | None = Field(default=None, gt=0)
    scope: Scope
    turn: TurnMarkers | None = None
    max_norm: float = Field(gt=0, description="tokens with a larger residual norm are sinks")
    min_tokens: int = Field(default=2, ge=1, description="off with fewer scored tokens")
    margin_edited: float | None = None
    margin_unrelated: float | None = None

    @model_validator(mode="after")
    def _absolute_needs_alpha(self) -> "Decision":
        if self.statistic == "absolute" and self.alpha is None:
            raise ValueError("an absolute decision needs alpha")
        return self


class Manifest(_Part):
    """The whole of `microedit.json`."""

    format: Literal["microedit-edit-set"] = "microedit-edit-set"
    version: int = FORMAT_VERSION
    model: ModelIdentity
    sae: SaeIdentity
    layer: int = Field(ge=0, description="decoder layer, 0-based; z is its output")
    solver: Literal["sequential", "joint"]
    facts: int = Field(ge=0)
    decision: Decision
    placement: Literal["replace", "delta"]
    position: Literal["decision", "sequence"] = "decision"
    activation: Literal["topk", "threshold"]
    theta: float | None = None
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Any] = Field(default_factory=dict)
    created_with: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if self.layer >= self.model.num_layers:
            raise ValueError(f"layer {self.layer} is beyond the model's {self.model.num_layers}")
        if self.sae.k > self.sae.num_latents:
            raise ValueError("k exceeds the number of latents")
        if self.carries and (self.placement != "delta" or self.position != "decision"):
            raise ValueError("a carried change needs delta placement at the decision position")
        if self.activation == "threshold" and (self.theta is None or self.placement != "delta"):
            raise ValueError("activation by threshold needs theta and delta placement")
        return self

    @property
    def carries(self) -> bool:
        """Whether the set has a carried change."""
        return self.version == CARRYING_VERSION

    @property
    def serve_flags(self) -> tuple[str, ...]:
        """Flags of `vllm serve` that the set does not work without."""
        return SEQUENCE_FLAGS if self.position == "sequence" else ()

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read and check `microedit.json`.

    Raises:
        MicroEditError: missing, not JSON, of an unknown format version, or inconsistent.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MicroEditError(
            f"{path.parent} is not an edit set: {path.name} is missing; "
            "make one with `microedit edit`"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise MicroEditError(f"{path} cannot be read ({error}); make the set again") from error
    version = raw.get("version") if isinstance(raw, dict) else None
    if version not in (FORMAT_VERSION, CARRYING_VERSION):
        raise MicroEditError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION} and "
            f"{CARRYING_VERSION}; install the release that wrote it or make the set again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise MicroEditError(f"{path}: {where}: {first['msg']}; make the set again") from error
