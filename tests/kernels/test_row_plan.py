import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.row_plan import OFF, SCORED, SUBSTITUTED, group_rows, kernel, row_states

BEYOND = 1 << 40


def test_a_mixed_step():
    """A chunk of a prompt, another's decode row, and a sequence without edits."""
    positions = torch.tensor([3, 4, 5, 6, 40, 0, 1])
    scored_from = torch.tensor([4, 4, 4, 4, 10, 0, 0])
    scored_to = torch.tensor([6, 6, 6, 6, 20, 0, 0])
    edit_from = torch.tensor([6, 6, 6, 6, 21, BEYOND, BEYOND])
    states = row_states(positions, scored_from, scored_to, edit_from)
    assert states.dtype == torch.int8
    assert states.tolist() == [OFF, SCORED, SCORED, SUBSTITUTED, SUBSTITUTED, OFF, OFF]
    rows, offsets = group_rows(states.int() - SCORED, 2)
    assert rows.tolist() == [1, 2, 3, 4]
    assert offsets.tolist() == [0, 2, 4]


def test_an_empty_step():
    nothing = torch.empty(0, dtype=torch.int64)
    states = row_states(nothing, nothing, nothing, nothing)
    assert states.shape == (0,)
    rows, offsets = group_rows(states.int() - SCORED, 2)
    assert rows.shape == (0,)
    assert offsets.tolist() == [0, 0, 0]


row = st.tuples(*[st.integers(0, 12)] * 4)


@settings(deadline=None, max_examples=150)
@given(st.lists(row, min_size=1, max_size=8))
def test_every_row_is_in_the_state_that_its_position_says(rows):
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    states = row_states(*columns)
    for state, (position, scored_from, scored_to, edit_from) in zip(
        states.tolist(), rows, strict=True
    ):
        if position >= edit_from:
            assert state == SUBSTITUTED
        else:
            assert state == (SCORED if scored_from <= position < scored_to else OFF)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-1, 3), max_size=20))
def test_rows_are_grouped_by_key_in_order(keys):
    rows, offsets = group_rows(torch.tensor(keys, dtype=torch.int32), 4)
    lists = [rows[offsets[key] : offsets[key + 1]].tolist() for key in range(4)]
    assert lists == [[row for row, k in enumerate(keys) if k == key] for key in range(4)]
    assert len(rows) == sum(key >= 0 for key in keys)


@pytest.mark.parametrize("M", [1, 7, 1024, 1025, 3000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_keys", [1, 3])
def test_the_kernel_groups_as_the_reference(M, share, num_keys, device):
    generator = torch.Generator().manual_seed(M)
    keys = torch.randint(num_keys, (M,), generator=generator)
    keys = keys.where(torch.rand(M, generator=generator) < share, -1).int().to(device)
    rows = torch.full((M,), 1 << 30, dtype=torch.int32, device=device)
    offsets = torch.full((num_keys + 1,), 1 << 30, dtype=torch.int32, device=device)
    kernel.group_rows(keys, rows, offsets)
    expected_rows, expected_offsets = group_rows(keys, num_keys)
    assert offsets.tolist() == expected_offsets.tolist()
    assert rows[: offsets[-1]].tolist() == expected_rows.tolist()
    assert (rows[offsets[-1] :] == 1 << 30).all()
