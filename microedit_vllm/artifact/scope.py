"""Which tokens of a prompt can decide whether an edit applies."""

from collections.abc import Sequence

from microedit_vllm.artifact.manifest import Scope, TurnMarkers


def scored_span(
    token_ids: Sequence[int], edit_from: int, scope: Scope, turn: TurnMarkers | None
) -> tuple[int, int]:
    """Positions [from, to) of the tokens that the scope scores.

    Where the chat template marks turns and the prompt ends with its generation prompt, only the
    last user turn's own words count: not the markers around them, which every chat shares.
    Position 0 (an attention sink in every prompt) and the decision token are never scored. The
    result depends on the token ids up to `edit_from` and on nothing else.

    Args:
        token_ids: the request's tokens; those after `edit_from` are not looked at.
        edit_from: the decision position e (the prompt's last token unless the request says so).
        scope: how many tokens before e are looked at.
        turn: the template's markers, None for a model without a chat template.

    Returns:
        (from, to), an empty span when nothing can be scored.
    """
    start, stop = 1, edit_from
    prompt = list(token_ids[: edit_from + 1])
    if turn is not None and _ends_with(prompt, turn.end):
        stop = min(stop, len(prompt) - len(turn.end))
        start = max(start, _after_last(prompt[:stop], turn.start))
    if scope.last is not None:
        start = max(start, stop - scope.last)
    return (start, stop) if stop > start else (0, 0)


def _ends_with(tokens: list[int], tail: Sequence[int]) -> bool:
    return len(tail) > 0 and tokens[-len(tail) :] == list(tail)


def _after_last(tokens: list[int], marker: Sequence[int]) -> int:
    """Position just behind the last occurrence of `marker`, 0 when there is none."""
    wanted, size = list(marker), len(marker)
    for begin in range(len(tokens) - size, -1, -1):
        if size and tokens[begin : begin + size] == wanted:
            return begin + size
    return 0
