"""From a step's requests to the rows that need the SAE.

The host knows how many rows there are and at which positions; the KV slots are looked up in the
device's own block table. One upload per step, nothing read back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microedit_vllm.engine.step_metadata import RequestState, Step, StepRequest

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepPlan:
    """The rows of one step that need the SAE; all tensors int64 on the device.

    Attributes:
        scored_rows, scored_slots: rows to score, and where their distances go, two [S].
        deciding: requests to decide, after the scoring.
        decide_rows, decide_slots: the rows of their tokens e, and where their decisions go, two
            [D].
        window_slots: KV slots of their scored tokens in order of position, [D, W].
        in_window: which of them are tokens of the window, [D, W] bool.
        edited_rows, decision_slots: rows to substitute where the switch is on, and the slot that
            holds their request's decision, two [R].
    """

    scored_rows: Tensor
    scored_slots: Tensor
    deciding: list[RequestState]
    decide_rows: Tensor
    decide_slots: Tensor
    window_slots: Tensor
    in_window: Tensor
    edited_rows: Tensor
    decision_slots: Tensor


def scores_or_decides(step: Step) -> bool:
    """Whether a step needs more than the substitution of rows that are decided."""
    return any(
        request.state.plan is not None
        and request.first_position <= request.state.plan.edit_from
        and request.first_position + request.num_rows > request.state.plan.scored_from
        for request in step.requests
    )


def plan_step(step: Step, device: torch.device) -> StepPlan | None:
    """Plan a step; None when no row of it needs the SAE."""
    scored, edited, deciding = [], [], []
    for request in step.requests:
        plan, first = request.state.plan, request.first_position
        if plan is None:
            continue
        end = first + request.num_rows
        if first <= plan.edit_from:
            # It will be decided, perhaps once more: what was known of it is known no longer.
            request.state.on = None
            request.state.version += 1
        begin, stop = max(first, plan.scored_from), min(end, plan.scored_to)
        if begin < stop:
            scored.append((request, begin, stop))
        if first <= plan.edit_from < end:
            deciding.append(request)
        if end > plan.edit_from and request.state.on is not False:
            edited.append((request, max(first, plan.substitute_from), end))
    if not scored and not edited:
        return None
    return _upload(step, scored, deciding, edited, device)


_Spans = list[tuple[StepRequest, int, int]]


def _upload(
    step: Step,
    scored: _Spans,
    deciding: list[StepRequest],
    edited: _Spans,
    device: torch.device,
) -> StepPlan:
    """Send rows and (table row, position) pairs in one piece, and look the slots up there."""
    scored_rows, scored_at = _rows(scored), _places(scored)
    windows = [(request, *_window(request)) for request in deciding]
    width = max((stop - begin for _, begin, stop in windows), default=0)
    window_at = np.zeros((2, len(windows), width), dtype=np.int64)
    sizes = np.zeros(len(windows), dtype=np.int64)
    for line, (request, begin, stop) in enumerate(windows):
        window_at[0, line] = request.index
        window_at[1, line, : stop - begin] = np.arange(begin, stop)
        sizes[line] = stop - begin
    parts = [
        *(scored_rows, _rows(edited), _decision_rows(deciding), sizes, scored_at, window_at),
        *(_decision_places(deciding, [1] * len(deciding)), _edited_places(edited)),
    ]
    rows_s, rows_e, rows_d, size, *places = _send(parts, device)
    scored_slots, window_slots, decide_slots, edited_slots = (
        step.block_table[at[0], at[1] // step.block_size] * step.block_size
        + at[1] % step.block_size
        for at in places
    )
    in_window = torch.arange(width, device=device) < size[:, None]
    return StepPlan(
        *(rows_s, scored_slots, [request.state for request in deciding]),
        *(rows_d, decide_slots, window_slots, in_window, rows_e, edited_slots),
    )


def _send(parts: Sequence[Numbers], device: torch.device) -> list[Tensor]:
    flat = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    pieces = flat.to(device, non_blocking=True).split([part.size for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _window(request: StepRequest) -> tuple[int, int]:
    assert request.state.plan is not None
    return request.state.plan.scored_from, request.state.plan.scored_to


def _decision_rows(deciding: list[StepRequest]) -> Numbers:
    """Batch row of token e of each request: [D]."""
    rows = [
        request.first_row + request.state.plan.edit_from - request.first_position
        for request in deciding
        if request.state.plan is not None
    ]
    return np.array(rows, dtype=np.int64)


def _rows(spans: _Spans) -> Numbers:
    """Batch rows of the given positions of each request: [N]."""
    return _joined(
        [
            np.arange(begin, stop) + (request.first_row - request.first_position)
            for request, begin, stop in spans
        ]
    )


def _places(spans: _Spans) -> Numbers:
    """Table row and position of each token of the spans: [2, N]."""
    lengths = [stop - begin for _, begin, stop in spans]
    indices = np.repeat([request.index for request, _, _ in spans], lengths)
    positions = _joined([np.arange(begin, stop) for _, begin, stop in spans])
    return np.stack([indices, positions]).astype(np.int64)


def _edited_places(spans: _Spans) -> Numbers:
    """Table row and position of token e for each row of the spans: [2, N]."""
    lengths = [stop - begin for _, begin, stop in spans]
    return _decision_places([request for request, _, _ in spans], lengths)


def _decision_places(requests: list[StepRequest], lengths: list[int]) -> Numbers:
    plans = [request.state.plan for request in requests]
    pairs = [
        [request.index for request in requests],
        [plan.edit_from for plan in plans if plan is not None],
    ]
    return np.repeat(np.array(pairs, dtype=np.int64).reshape(2, -1), lengths, axis=1)


def _joined(parts: list[Numbers]) -> Numbers:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
