"""The Triton decision against the reference, over windows spread in the KV slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.switch import decide, kernel, smallest_runs


def check(sequences, width, run, min_tokens, alpha, tau, device, values=None):
    generator = torch.Generator().manual_seed(sequences * 100 + width + run)
    slots = 4 * sequences * max(width, 1) + 1
    dist, dist0 = (torch.rand(slots, generator=generator) + 0.5 for _ in "01")
    if values is not None:
        dist = values[torch.randint(len(values), (slots,), generator=generator)]
    counts = torch.rand(slots, generator=generator) < 0.8
    order = torch.randperm(slots, generator=generator)
    window = order[: sequences * width].view(sequences, width)
    decide_slots = order[sequences * width : sequences * (width + 1)]
    sizes = torch.randint(0, width + 1, (sequences,), generator=generator)
    in_window = torch.arange(width) < sizes[:, None]
    ards = torch.full((sequences,), torch.nan, device=device)
    on = torch.zeros(slots, dtype=torch.bool, device=device)
    compacted = torch.full((max(sequences * 2 * width, 1),), torch.nan, device=device)
    moved = (t.to(device) for t in (dist, dist0, counts, window, in_window, decide_slots))
    kernel.decide(*moved, ards, on, compacted, tau, run, min_tokens, alpha)
    counted = counts[window] & in_window
    weight = dist0[window] if alpha is None else torch.full_like(dist[window], alpha)
    expected = smallest_runs(dist[window], weight, counted, run)
    expected = expected.where(counted.sum(-1) >= min_tokens, torch.inf)
    torch.testing.assert_close(ards.cpu(), expected, equal_nan=True)
    assert torch.equal(on.cpu()[decide_slots], decide(ards.cpu(), tau))
    assert int(on.sum()) == int(decide(ards, tau).sum())


@pytest.mark.parametrize("run", [0, 1, 8, 16])
@pytest.mark.parametrize("width", [0, 1, 5, 16, 64])
@pytest.mark.parametrize("alpha", [None, 600.0])
def test_decisions(run, width, alpha, device):
    check(5, width, run, 0, alpha, 1.0 if alpha is None else 1 / 600, device)


def test_too_few_tokens_are_off(device):
    check(7, 12, 4, 6, None, 1e9, device)


def test_infinities_and_nan_are_off(device):
    values = torch.tensor([1.0, torch.inf, torch.nan, 0.0])
    for run in (0, 3):
        check(40, 6, run, 0, None, 1e9, device, values)


def test_nobody_to_decide(device):
    check(0, 4, 2, 0, None, 1.0, device)


def test_a_long_window(device):
    check(2, 1500, 0, 0, 600.0, 1 / 600, device)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 20), st.integers(0, 5))
def test_any_window(sequences, width, run, min_tokens):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(sequences, width, run, min_tokens, None, 1.0, device)
