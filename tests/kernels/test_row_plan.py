import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_kernels.row_plan import OFF, SCORED, SUBSTITUTED, compact_rows, row_states

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
    assert compact_rows(states, SCORED).tolist() == [1, 2]
    assert compact_rows(states, SUBSTITUTED).tolist() == [3, 4]


def test_an_empty_step():
    nothing = torch.empty(0, dtype=torch.int64)
    states = row_states(nothing, nothing, nothing, nothing)
    assert states.shape == (0,)
    assert compact_rows(states, SCORED).shape == (0,)


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
    lists = [compact_rows(states, which).tolist() for which in (OFF, SCORED, SUBSTITUTED)]
    assert sorted(itertools.chain(*lists)) == list(range(len(rows)))
    assert all(found == sorted(found) for found in lists)
