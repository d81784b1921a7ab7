"""Launching allocates nothing and reads nothing back, so that a CUDA graph can hold it.

The kernels themselves are left out: the interpreter copies tensors.
"""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from microedit_kernels.edit_change import EditRows
from microedit_kernels.edit_change import kernel as edit_change
from microedit_kernels.row_plan import kernel as row_plan
from microedit_kernels.sparse_decode import kernel as sparse_decode
from microedit_kernels.switch import kernel as switch
from microedit_kernels.topk_encode import fp8_filter
from microedit_kernels.topk_encode import kernel as topk_encode
from tests.microedit_vllm.engine.dispatch_guards import ForbiddenError, NoAllocation

M, D, N, K, CHANGED, SLOTS = 5, 32, 200, 8, 10, 64
CPU = torch.device("cpu")


class Recorder:
    """In a kernel's place."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self._name, self._launched = name, launched

    def __getitem__(self, grid):
        assert all(isinstance(size, int) for size in grid), "a grid that only the device knows"
        return lambda *arguments, **constants: self._launched.append(self._name)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that were launched; none of them runs."""
    found: list[str] = []
    for module in (row_plan, topk_encode, fp8_filter, sparse_decode, switch, edit_change):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction | InterpretedFunction):
                monkeypatch.setattr(module, name, Recorder(name, found))
    return found


def floats(*shape):
    return torch.rand(shape)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def plan():
    return ints(M), ints(1)


def decoder():
    return sparse_decode.Decoder(floats(N, D), floats(D), ints(N), floats(CHANGED, D))


def encode_launch():
    scratch = topk_encode.EncodeScratch.allocate(2, N, K, CPU)
    norm = topk_encode.InputNorm(floats(M), floats(M), floats(N))
    arguments = (floats(M, D), *plan(), floats(N, D), floats(N), K, floats(M, K), ints(M, K))
    return lambda: topk_encode.topk_encode(*arguments, scratch, norm=norm)


def fp8_launch():
    encoder = fp8_filter.Fp8Encoder.quantise(floats(N, D), floats(N))
    scratch = fp8_filter.Fp8Scratch.allocate(M, N, K, CPU)
    arguments = (floats(M, D), *plan(), encoder, K, floats(M, K), ints(M, K))
    return lambda: fp8_filter.fp8_topk_encode(*arguments, scratch)


def merge_launch():
    arguments = (floats(M, 2 * K), ints(M, 2 * K), ints(1), K, floats(M, K), ints(M, K))
    return lambda: topk_encode.merge_candidates(*arguments)


def group_launch():
    arguments = (ints(M), ints(M), ints(3))
    return lambda: row_plan.group_rows(*arguments)


def score_launch():
    codes = (*plan(), floats(M, K), ints(M, K), decoder())
    state = (ints(M), floats(SLOTS), floats(SLOTS), torch.zeros(SLOTS, dtype=torch.bool))
    z, scratch = floats(M, D), sparse_decode.DecodeScratch.allocate(M, D, K, CPU)
    return lambda: sparse_decode.score(z, *codes, *state, 1e3, scratch)


def substitute_launch():
    codes = (*plan(), floats(M, K), ints(M, K), decoder())
    hidden, z, scratch = (
        *(floats(M, D), floats(M, D)),
        sparse_decode.DecodeScratch.allocate(M, D, K, CPU),
    )
    return lambda: sparse_decode.substitute(hidden, z, *codes, "replace", scratch)


def parts_launch():
    codes = (*plan(), floats(M, K), ints(M, K), decoder())
    z, parts = floats(M, D), floats(2, M, D)
    scratch = sparse_decode.DecodeScratch.allocate(M, D, K, CPU)
    return lambda: sparse_decode.decode_parts(z, *codes, parts, scratch)


def decide_launch():
    slots = (floats(SLOTS), floats(SLOTS), torch.ones(SLOTS, dtype=torch.bool))
    window = torch.zeros(2, 6, dtype=torch.int64)
    rest = (window.bool(), window[:, 0].contiguous(), floats(2), slots[2].clone(), floats(24))
    return lambda: switch.decide(*slots, window, *rest, 0.5, 4, 1, None)


def edit_launch():
    rows = EditRows(floats(CHANGED, D), floats(CHANGED), None, floats(CHANGED, D), 0.1)
    sets = edit_change.GroupedSets.join([rows])
    scratch = edit_change.EditChangeScratch.allocate(M, sets)
    hidden, z, rows, offsets = floats(M, D), floats(M, D), ints(M), ints(2)
    return lambda: edit_change.add_edit_change(hidden, z, rows, offsets, sets, scratch)


LAUNCHES = [
    *(encode_launch, fp8_launch, merge_launch, group_launch, score_launch, substitute_launch),
    *(parts_launch, decide_launch, edit_launch),
]


@pytest.mark.parametrize("make", LAUNCHES, ids=lambda make: make.__name__)
def test_a_launch_allocates_nothing_and_reads_nothing_back(make, launched):
    launch = make()
    del launched[:]
    with NoAllocation():
        launch()
        launch()
        with pytest.raises(ForbiddenError):
            floats(1) + 1
    assert launched and launched[: len(launched) // 2] == launched[len(launched) // 2 :]


def test_every_kernel_is_launched_here(launched):
    modules = (row_plan, topk_encode, fp8_filter, sparse_decode, switch, edit_change)
    recorders = {
        name for module in modules for name, v in vars(module).items() if isinstance(v, Recorder)
    }
    for make in LAUNCHES:
        make()()
    helpers = recorders - set(launched)
    assert helpers <= {
        *("operand", "rounded", "order_key", "chosen_places", "key_range"),
        *("_gather", "_sum_of_splits"),
    }
