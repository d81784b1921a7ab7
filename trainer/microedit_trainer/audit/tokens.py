"""The prompt token by token, by the numbers that decide."""

from typing import Any

import torch
from torch import Tensor

from microedit_trainer.audit.explanation import Token
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact import EditOperator


def decision_of(
    operator: EditOperator, stored: StoredPrompt, tokenizer: Any
) -> tuple[Tensor, tuple[Token, ...]]:
    """The decision's statistic of a prompt, a scalar fp32, and what it came from.

    Args:
        stored: a prompt without an answer.
    """
    z, scored = stored.z, stored.scored
    # The counted tokens by themselves, as they are when the switch decides: another batch may
    # round otherwise.
    dist, dist0 = operator.distances(z[scored])
    ard = operator.ard(dist, dist0)
    ratios = _ratios(operator, *operator.distances(z))
    ratios[scored] = _ratios(operator, dist, dist0)
    run_ards: dict[int, float] = {}
    deciding: set[int] = set()
    if ard.isfinite():
        runs = operator.run_ards(dist, dist0)
        size = len(scored) - len(runs) + 1
        run_ards = dict(zip(scored[size - 1 :].tolist(), runs.tolist(), strict=True))
        first = int(runs.argmin())
        deciding = set(scored[first : first + size].tolist())
    changed = (operator.scoring_rows[operator.encode(z)[1]] >= 0).sum(-1)
    start, stop = stored.tokens.scored
    ids = stored.tokens.prompt_ids
    tokens = tuple(
        Token(
            position=position,
            id=ids[position],
            text=tokenizer.decode([ids[position]]),
            scored=start <= position < stop,
            sink=bool(stored.is_sink[position]),
            ratio=ratio if ratio < torch.inf else None,
            run_ard=run_ards.get(position),
            decides=position in deciding,
            changed=count,
        )
        for position, (ratio, count) in enumerate(
            zip(ratios.tolist(), changed.tolist(), strict=True)
        )
    )
    return ard, tokens


def _ratios(operator: EditOperator, dist: Tensor, dist0: Tensor) -> Tensor:
    return dist / operator.weights(dist0)
