"""Time of a launch: by CUDA graphs and events, or on the host where there is no GPU."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Launch = Callable[[], object]

_GRAPH_SECONDS = 2e-3
_GRAPH_LAUNCHES = 256
_REPLAYS = (3, 60)
_PAIRS = 4


def rotation(touched: int, cache: int) -> int:
    """How many inputs take turns, so that none is still in the cache when its turn comes again.

    Args:
        touched: bytes that one launch reads from memory.
        cache: bytes of the L2 cache.
    """
    if touched >= 2 * cache:
        return 1
    return min(_GRAPH_LAUNCHES, math.ceil(4 * cache / max(touched, 1)))


class Timer(Protocol):
    name: str

    def __call__(self, launches: Sequence[Launch]) -> float:
        """Seconds of one launch, where they take turns."""

    def alternate(self, first: Launch, second: Launch) -> list[tuple[float, float]]:
        """Seconds of both, in pairs that were measured side by side."""

    def captured(self, launch: Launch) -> Launch:
        """What replays it."""


class GraphTimer:
    """Times launches inside a CUDA graph, median of its replays.

    Args:
        seconds: how long one measurement may go on, at the least three replays.
    """

    name = "CUDA graphs and events, median"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, launches: Sequence[Launch]) -> float:
        for launch in launches:
            launch()
        once = self._spans([lambda: [launch() for launch in launches]])[0]
        rounds = max(1, min(_GRAPH_SECONDS / once, _GRAPH_LAUNCHES / len(launches)))
        replay = self.captured(
            lambda: [launch() for _ in range(math.ceil(rounds)) for launch in launches]
        )
        spans = self._spans([replay] * self._replays(self._spans([replay])[0]))
        return statistics.median(spans) / (math.ceil(rounds) * len(launches))

    def alternate(self, first: Launch, second: Launch) -> list[tuple[float, float]]:
        # A share of a per cent of a step is looked for: many pairs, an even number of them.
        pairs = 2 * self._replays(sum(self._spans([first, second])) / _PAIRS)
        # Whoever goes second finds the card warmer: they take turns at it.
        order = [(first, second) if i % 2 == 0 else (second, first) for i in range(pairs)]
        spans = self._spans([launch for pair in order for launch in pair])
        found = list(zip(spans[::2], spans[1::2], strict=True))
        return [pair if i % 2 == 0 else pair[::-1] for i, pair in enumerate(found)]

    def captured(self, launch: Launch) -> Launch:
        launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graph.replay()
        return graph.replay

    def _replays(self, seconds: float) -> int:
        return int(min(max(self.seconds / seconds, _REPLAYS[0]), _REPLAYS[1]))

    @staticmethod
    def _spans(launches: Sequence[Launch]) -> list[float]:
        # All are queued before one is waited for: the host must never be what the card waits for.
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in launches]
        for launch, (start, end) in zip(launches, events, strict=True):
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


class HostTimer:
    """Times each launch once, by the host's clock: to run the benchmark, not to learn a speed."""

    name = "interpreter, no figure of speed"

    def __call__(self, launches: Sequence[Launch]) -> float:
        return self._span(lambda: [launch() for launch in launches]) / len(launches)

    def alternate(self, first: Launch, second: Launch) -> list[tuple[float, float]]:
        return [(self._span(first), self._span(second)) for _ in range(3)]

    def captured(self, launch: Launch) -> Launch:
        return launch

    @staticmethod
    def _span(launch: Launch) -> float:
        start = time.perf_counter()
        launch()
        return time.perf_counter() - start
