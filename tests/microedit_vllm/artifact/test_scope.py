import pytest
from hypothesis import given
from hypothesis import strategies as st

from microedit_vllm.artifact import Scope, TurnMarkers, scored_span

USER, ASSISTANT, END, NEWLINE = 901, 902, 903, 904
TURN = TurnMarkers(start=[USER, NEWLINE], end=[END, ASSISTANT, NEWLINE])
ALL = Scope(last=None, run=0)


def turn(words):
    return [USER, NEWLINE, *words, END, ASSISTANT, NEWLINE]


def scored_words(tokens, edit_from, scope, markers):
    start, stop = scored_span(tokens, edit_from, scope, markers)
    return tokens[start:stop]


def last(tokens):
    return len(tokens) - 1


def test_bare_leaves_out_the_sink_and_the_decision_token():
    tokens = [10, 11, 12, 13, 14]
    assert scored_words(tokens, last(tokens), ALL, None) == [11, 12, 13]
    assert scored_words(tokens, last(tokens), ALL, TURN) == [11, 12, 13]


def test_the_window_is_the_last_tokens_before_the_decision():
    tokens = list(range(100))
    assert scored_span(tokens, 99, Scope(last=10), None) == (89, 99)
    assert scored_span(tokens, 50, Scope(last=10), None) == (40, 50)
    assert scored_span(tokens, 5, Scope(last=10), None) == (1, 5)


def test_chat_scores_the_users_words_without_the_markers():
    tokens = turn([10, 11, 12])
    assert scored_words(tokens, last(tokens), ALL, TURN) == [10, 11, 12]


def test_a_chat_answer_under_way_changes_nothing():
    """Decode steps and teacher forcing bring more tokens behind the generation prompt."""
    prompt = turn([10, 11, 12])
    answered = [*prompt, 60, 61, END, *turn([70])]
    for length in range(len(prompt), len(answered) + 1):
        assert scored_words(answered[:length], last(prompt), ALL, TURN) == [10, 11, 12]


def test_of_several_turns_only_the_last_counts():
    tokens = [*turn([10, 11, 12]), 50, 51, END, *turn([20, 21])]
    assert scored_words(tokens, last(tokens), ALL, TURN) == [20, 21]


def test_the_window_counts_back_from_the_end_of_the_words():
    tokens = turn([10, 11, 12, 13, 14])
    assert scored_words(tokens, last(tokens), Scope(last=2), TURN) == [13, 14]


def test_a_chat_prompt_that_does_not_end_with_the_generation_prompt_is_taken_as_it_is():
    tokens = [*turn([10, 11]), 30, 31]
    assert scored_words(tokens, last(tokens), ALL, TURN) == tokens[1:-1]


@pytest.mark.parametrize("tokens", [[], [5], [5, 6], turn([])])
def test_nothing_to_score_is_the_empty_span(tokens):
    assert scored_span(tokens, len(tokens) - 1, ALL, TURN) == (0, 0)


def test_empty_markers_mark_nothing():
    tokens = [10, 11, 12, 13]
    markers = TurnMarkers(start=[], end=[])
    assert scored_words(tokens, last(tokens), ALL, markers) == [11, 12]


token = st.sampled_from([USER, ASSISTANT, END, NEWLINE, 1, 2, 3])


@given(
    st.lists(token, max_size=30),
    st.lists(token, max_size=8),
    st.integers(0, 30),
    st.none() | st.integers(1, 12),
)
def test_tokens_behind_the_decision_do_not_matter(tokens, answer, edit_from, window):
    """Invariant 2: one request, one answer, however far it has been generated."""
    edit_from = min(edit_from, len(tokens) - 1)
    scope = Scope(last=window)
    start, stop = scored_span(tokens[: edit_from + 1], edit_from, scope, TURN)
    assert scored_span([*tokens[: edit_from + 1], *answer], edit_from, scope, TURN) == (start, stop)
    assert (start, stop) == (0, 0) or 1 <= start < stop <= edit_from
    assert window is None or stop - start <= window
