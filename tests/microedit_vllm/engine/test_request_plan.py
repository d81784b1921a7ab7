import pytest

from microedit_vllm.artifact import Decision, Scope
from microedit_vllm.engine.request_plan import RequestPlan, plan_request
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_manifest, tiny_sae

DECISION = Decision(statistic="relative", tau=0.9, scope=Scope(last=4, run=2), max_norm=1e3)
MANIFEST = tiny_manifest(tiny_sae(), decision=DECISION)


def test_the_default_decides_at_the_last_prompt_token():
    assert plan_request(range(10), None, MANIFEST) == RequestPlan(9, 5, 9, 9)


def test_edit_from_moves_the_decision_and_its_window():
    plan = plan_request(range(10), {"microedit_edit_from": 6}, MANIFEST)
    assert plan == RequestPlan(6, 2, 6, 6)


def test_nothing_to_score_is_an_empty_span():
    plan = plan_request(range(10), {"microedit_edit_from": 0}, MANIFEST)
    assert plan is not None
    assert plan.scored_from == plan.scored_to


def test_the_papers_placement_replaces_all_but_the_first_token():
    manifest = tiny_manifest(tiny_sae(), decision=DECISION, position="sequence")
    assert plan_request(range(10), None, manifest) == RequestPlan(9, 5, 9, 1)


@pytest.mark.parametrize("tokens, options", [(range(10), {"microedit": "off"}), (None, None)])
def test_a_request_without_edits_has_no_plan(tokens, options):
    assert plan_request(tokens, options, MANIFEST) is None


def test_options_of_others_are_left_alone():
    assert plan_request(range(3), {"session_id": 7}, MANIFEST) is not None


@pytest.mark.parametrize(
    "options, named",
    [
        ({"microedit": "maybe"}, "maybe"),
        ({"microedit": 1}, "1"),
        ({"microedit": ["off"]}, "off"),
        ({"microedit_edit_from": -1}, "-1"),
        ({"microedit_edit_from": 10}, "10"),
        ({"microedit_edit_from": 2.0}, "2.0"),
        ({"microedit_edit_from": "2"}, "'2'"),
        ({"microedit_edit_from": True}, "True"),
        ({"microedit_edit_form": 2}, "microedit_edit_form"),
    ],
)
def test_a_bad_option_is_named_in_one_line(options, named):
    with pytest.raises(MicroEditError, match="vllm_xargs") as caught:
        plan_request(range(10), options, MANIFEST)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
