"""What a step is made of: the small interface between the engine and vLLM's model runners.

The rest of the engine sees `Step`s only. An adapter per runner makes them: `runner_v1` for the
runner of the CPU engine and of older GPU servers, `runner_v2` for Model Runner V2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from microedit_vllm.engine.request_plan import RequestPlan


@dataclass
class RequestState:
    """A request in the worker; lives as long as vLLM's own record of it.

    Attributes:
        request_id: vLLM's own id.
        plan: None where the request asks for no edits.
        on: the decision as the host last saw it, None when it has not. Only a shortcut: the
            decision itself lies at the KV slot of token e.
        version: counts the steps that computed anything before its decision; a decision of an
            older version is no longer its own.
    """

    request_id: str
    plan: RequestPlan | None
    on: bool | None = None
    version: int = 0


@dataclass(frozen=True)
class StepRequest:
    """One request's share of a step; host numbers only.

    Attributes:
        index: its row in the block table.
        first_row: its first row in the batch's hidden states; row i of the share is the token at
            position `first_position` + i.
        first_position: exact while the prompt is computed; while tokens are generated it may be
            any position behind e (asynchronous speculation knows it on the device only).
    """

    state: RequestState
    index: int
    first_row: int
    num_rows: int
    first_position: int


@dataclass(frozen=True)
class Step:
    """The requests of a step that may need the SAE.

    Attributes:
        block_table: [rows, blocks] int32 on the device, of the KV cache group that the state
            follows; what it holds when the forward runs is what counts.
        block_size: tokens in one of its blocks.
    """

    requests: list[StepRequest]
    block_table: Tensor
    block_size: int


class RunnerAdapter(Protocol):
    """How the engine sees a model runner."""

    def num_slots(self) -> int:
        """KV slots of the group that the state follows, once the KV cache is sized.

        Raises:
            MicroEditError: see `microedit_vllm.engine.kv_group.followed_group`.
        """

    def attach(
        self,
        on_step: Callable[[Step], bool],
        on_new_request: Callable[[RequestState], None],
    ) -> None:
        """Call back for every real step, never for profiling, warm-up or capture.

        `on_new_request` is called once per request; `on_step` when the step's inputs are known and
        its CUDA graph is not. Where `on_step` returns True, the step must run without one.

        Raises:
            MicroEditError: a feature of vLLM is on that lays a step's rows out in another way.
        """
