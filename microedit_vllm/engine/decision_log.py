"""Decisions on their way to the host: for those who ask, and for the scheduler."""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from microedit_vllm.engine.step_metadata import RequestState

RECORDS = 4096


class DecisionRecords:
    """The last decisions by request id, in a ring on the device that is read only when asked."""

    def __init__(self, device: torch.device, capacity: int = RECORDS) -> None:
        self._ard = torch.zeros(capacity, device=device)
        self._on = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._owners: list[str | None] = [None] * capacity
        self._places: OrderedDict[str, int | None] = OrderedDict()
        self._next = 0

    def write(self, request_ids: list[str], ards: Tensor, on: Tensor) -> None:
        """Keep ARD and decision of some requests, [D] each, over the oldest when full."""
        for first in range(0, len(request_ids), len(self._owners)):
            part = slice(first, first + len(self._owners))
            self._write(request_ids[part], ards[part], on[part])

    def _write(self, request_ids: list[str], ards: Tensor, on: Tensor) -> None:
        capacity, begin = len(self._owners), self._next
        for offset, request_id in enumerate(request_ids):
            place = (begin + offset) % capacity
            owner = self._owners[place]
            if owner is not None and self._places.get(owner) == place:
                del self._places[owner]
            self._owners[place] = request_id
            self._keep(request_id, place)
        self._next = (begin + len(request_ids)) % capacity
        tail = min(len(request_ids), capacity - begin)
        for ring, values in ((self._ard, ards), (self._on, on)):
            ring[begin : begin + tail] = values[:tail]
            ring[: len(request_ids) - tail] = values[tail:]

    def write_off(self, request_id: str) -> None:
        """Keep that a request asked for no edits."""
        self._keep(request_id, None)

    def _keep(self, request_id: str, place: int | None) -> None:
        self._places[request_id] = place
        self._places.move_to_end(request_id)
        while len(self._places) > len(self._owners):
            self._places.popitem(last=False)

    def read(self, request_id: str) -> dict[str, float | bool | None] | None:
        """{"ard", "on"}; ard is None where nothing was scored. None for an unknown request."""
        if request_id not in self._places:
            return None
        place = self._places[request_id]
        if place is None:
            return {"ard": None, "on": False}
        ard = float(self._ard[place])
        return {"ard": ard if math.isfinite(ard) else None, "on": bool(self._on[place])}


class DecisionFeedback:
    """Decisions for the host as they become known, without waiting for the device.

    On a device the copy to the host runs behind the step and is looked at in later ones.

    Args:
        tell_states: whether `RequestState.on` may be set as soon as a decision is known. Not where
            ranks must do the same at the same time: they would learn of it at different steps.
    """

    def __init__(self, device: torch.device, tell_states: bool = True) -> None:
        self._device = device
        self._tell_states = tell_states
        self._pending: list[tuple[list[tuple[RequestState, int]], Tensor, Any]] = []
        self._known: list[tuple[str, bool]] = []

    def decided(self, states: list[RequestState], on: Tensor) -> None:
        """Take the decisions [D] of the step in progress."""
        owners = [(state, state.version) for state in states]
        if self._device.type == "cpu":
            self._pending.append((owners, on, None))
        else:
            host = on.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((owners, host, event))

    def poll(self) -> None:
        """Note in each request's state what has become known."""
        while self._pending and (self._pending[0][2] is None or self._pending[0][2].query()):
            owners, on, _ = self._pending.pop(0)
            for (state, version), is_on in zip(owners, on.tolist(), strict=True):
                # A request that is computed again has a decision still to come.
                if state.version == version:
                    state.on = is_on if self._tell_states else None
                    self._known.append((state.request_id, is_on))

    def drain(self) -> list[tuple[str, bool]]:
        """vLLM's ids and decisions that became known since the last call."""
        self.poll()
        known, self._known = self._known, []
        return known
