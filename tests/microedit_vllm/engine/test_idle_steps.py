"""What an engine with an edit set does where no row needs the SAE, and what it keeps."""

from collections.abc import Iterator
from typing import Any

import pytest

from microedit_vllm.engine.edit_state import EditState
from tests.microedit_vllm.engine.in_process import engine_here
from tests.microedit_vllm.engine.tiny_served import TinyServed, tiny_served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> TinyServed:
    return tiny_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def llm(served) -> Iterator[Any]:
    setting = {"microedit": {"edit_set": str(served.edit_set)}}
    arguments = {"max_model_len": 256, "max_num_seqs": 4, "num_gpu_blocks_override": 40}
    with engine_here(served.model, additional_config=setting, **arguments) as engine:
        yield engine


@pytest.fixture
def applied(monkeypatch) -> list[int]:
    """A number per step in which the SAE did anything."""
    calls: list[int] = []
    apply = EditState.apply

    def counted(self: Any, hidden_states: Any, z: Any) -> None:
        calls.append(len(hidden_states))
        apply(self, hidden_states, z)

    monkeypatch.setattr(EditState, "apply", counted)
    return calls


def ask(llm: Any, tokens: list[int], edits: bool = True) -> None:
    from vllm import SamplingParams

    options = None if edits else {"microedit": "off"}
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, extra_args=options)
    llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)


def test_a_batch_without_edits_does_no_work(llm, served, applied):
    ask(llm, served.edited[0], edits=False)
    assert applied == []


def test_an_unrelated_request_is_scored_once(llm, served, applied):
    ask(llm, served.unrelated[3])
    assert applied == [len(served.unrelated[3])]


def test_an_edited_request_is_edited_at_every_token(llm, served, applied):
    ask(llm, served.edited[0])
    assert applied == [len(served.edited[0]), *[1] * 8]


def test_nothing_is_kept_of_requests_that_ended(llm, served):
    worker = llm.llm_engine.model_executor.driver_worker.worker
    state, scheduler = worker._edit_state, llm.llm_engine.engine_core.engine_core.scheduler
    sizes = []
    for _ in range(2):
        for _ in range(12):
            ask(llm, served.unrelated[4])
            ask(llm, served.edited[1])
        blocks = scheduler._edits._scored
        sizes.append((len(state.feedback._pending), len(state.feedback._known), len(blocks)))
    assert sizes[0] == sizes[1]
    assert len(scheduler.requests) == 0
