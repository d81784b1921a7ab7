import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microedit_trainer.calibration import LARGE, NearPrompts, calibrate, slack_for

NOTHING = torch.empty(0)
INF = math.inf


def test_tau_keeps_its_distance_from_the_nearest_ordinary_prompt():
    found = calibrate(torch.tensor([0.1, 0.2]), torch.tensor([1.5, 1.2, 3.0]), {}, slack=0.9)
    assert found.tau == pytest.approx(0.9 * 1.2)
    assert found.margin_unrelated == pytest.approx(0.1 * 1.2)
    assert found.margin_edited == pytest.approx(found.tau - 0.199)
    assert found.prompts == {"edited": 2, "ordinary": 3}
    assert found.fires == {"edited": 1.0, "ordinary": 0.0}


@pytest.mark.parametrize(("facts", "wanted"), [(10, 0.949), (100, 0.94), (200, 0.93), (300, 0.93)])
def test_more_facts_keep_tau_farther_from_ordinary_prompts(facts, wanted):
    assert slack_for(facts) == pytest.approx(wanted)
    assert slack_for(10_000) == pytest.approx(0.93)


def test_near_prompts_lower_tau_to_just_below_the_first_that_must_stay_off():
    near = torch.tensor([0.9, 0.3, 0.5, 0.7, 0.8, 0.95, 0.99, 1.0, 1.0, 1.0])
    found = calibrate(torch.tensor([0.1]), torch.tensor([2.0]), {"n": NearPrompts(near, 0.2)}, 0.9)
    assert 0.699 < found.tau < 0.7
    assert found.fires["n"] == pytest.approx(0.2)


def test_the_strictest_group_decides():
    loose, strict = NearPrompts(torch.tensor([0.8]), 0.0), NearPrompts(torch.tensor([0.4]), 0.0)
    for groups in ({"a": loose, "b": strict}, {"b": strict, "a": loose}):
        assert calibrate(torch.ones(1), torch.ones(1), groups, 0.9).tau == pytest.approx(0.4, 1e-5)


def test_a_group_that_may_switch_on_altogether_bounds_nothing():
    group = NearPrompts(torch.tensor([0.01, 0.02]), 1.0)
    assert calibrate(torch.ones(1), torch.ones(1), {"n": group}, slack=0.9).tau == pytest.approx(
        0.9
    )


def test_an_empty_group_is_not_reported():
    found = calibrate(torch.ones(1), torch.ones(1), {"n": NearPrompts(NOTHING, 0.0)}, slack=0.9)
    assert found.tau == pytest.approx(0.9)
    assert "n" not in found.prompts
    assert "n" not in found.fires


def test_prompts_without_scored_tokens_leave_finite_figures():
    """+∞ is what a prompt has that is too short to be scored; JSON cannot hold it."""
    near = {"n": NearPrompts(torch.tensor([INF, INF]), 0.0)}
    found = calibrate(torch.tensor([0.2, INF]), torch.tensor([INF]), near, slack=0.9)
    assert found.tau == pytest.approx(0.9 * LARGE)
    assert found.fires == {"edited": 0.5, "ordinary": 0.0, "n": 0.0}
    json.dumps(found.to_json(), allow_nan=False)


def test_tau_stays_positive_where_an_ordinary_prompt_is_reconstructed_exactly():
    assert calibrate(torch.ones(1), torch.tensor([0.0]), {}, 0.9).tau > 0


def test_edited_prompts_that_stay_off_show_in_the_margin():
    found = calibrate(torch.full((10,), 2.0), torch.tensor([1.0]), {}, slack=0.9)
    assert found.margin_edited == pytest.approx(0.9 - 2.0)
    assert found.fires["edited"] == 0.0


ARDS = st.lists(st.floats(0.0625, 5.0, width=32) | st.just(INF), min_size=1, max_size=30)


@settings(deadline=None, max_examples=100)
@given(ordinary=ARDS, near=ARDS, allowed=st.floats(0.0, 1.0))
def test_no_group_exceeds_what_it_allows(ordinary, near, allowed):
    group = NearPrompts(torch.tensor(near), allowed)
    found = calibrate(torch.ones(1), torch.tensor(ordinary), {"n": group}, 0.97)
    assert found.fires["ordinary"] == 0.0
    assert found.fires["n"] <= allowed + 1e-6
