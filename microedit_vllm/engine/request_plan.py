"""What a request asks of its edit set: a pure function of its tokens and its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microedit_vllm.artifact import Manifest, scored_span
from microedit_vllm.errors import MicroEditError

SWITCH = "microedit"
EDIT_FROM = "microedit_edit_from"


@dataclass(frozen=True)
class RequestPlan:
    """Where one request is scored, decided and substituted (positions in its sequence).

    Attributes:
        edit_from: e; the decision is taken at this token.
        scored_from, scored_to: the tokens that decide, [from, to); empty when from = to.
        substitute_from: the first token that is replaced: e, or 1 in the paper's placement, where
            all but the first are (position 0 is an attention sink).
    """

    edit_from: int
    scored_from: int
    scored_to: int
    substitute_from: int


def decision_position(
    prompt_token_ids: Sequence[int] | None, extra_args: Mapping[str, Any] | None
) -> int | None:
    """e of a request; None where it asks for no edits (or has no token ids to decide by).

    Args:
        prompt_token_ids: the prompt as first submitted, without generated tokens.
        extra_args: `SamplingParams.extra_args`, which is `vllm_xargs` in the OpenAI body.

    Raises:
        MicroEditError: an option of ours has an unknown name or a value out of range.
    """
    options = {key: v for key, v in (extra_args or {}).items() if key.startswith(SWITCH)}
    unknown = sorted(set(options) - {SWITCH, EDIT_FROM})
    if unknown:
        raise MicroEditError(
            f"vllm_xargs has no option {unknown[0]!r}; known are {SWITCH!r} and {EDIT_FROM!r}"
        )
    switch = options.get(SWITCH, "on")
    if switch not in ("on", "off"):
        raise MicroEditError(f"vllm_xargs.{SWITCH} must be 'on' or 'off', not {switch!r}")
    size = len(prompt_token_ids or ())
    edit_from = options.get(EDIT_FROM, max(size - 1, 0))
    valid = isinstance(edit_from, int) and not isinstance(edit_from, bool)
    if not valid or not 0 <= edit_from < max(size, 1):
        raise MicroEditError(
            f"vllm_xargs.{EDIT_FROM} must be a position in the prompt, a whole number from 0 to "
            f"{max(size - 1, 0)}, not {edit_from!r}"
        )
    return None if switch == "off" or size == 0 else edit_from


def plan_request(
    prompt_token_ids: Sequence[int] | None,
    extra_args: Mapping[str, Any] | None,
    manifest: Manifest,
) -> RequestPlan | None:
    """Plan a request; arguments, None and errors as in `decision_position`.

    Args:
        manifest: of the edit set that is served.
    """
    edit_from = decision_position(prompt_token_ids, extra_args)
    if edit_from is None or prompt_token_ids is None:
        return None
    decision = manifest.decision
    span = scored_span(prompt_token_ids, edit_from, decision.scope, decision.turn)
    substitute_from = 1 if manifest.position == "sequence" else edit_from
    return RequestPlan(edit_from, *span, substitute_from)
