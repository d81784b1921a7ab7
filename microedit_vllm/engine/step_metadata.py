"""What a step is made of: the small interface between the engine and vLLM's model runners.

The rest of the engine sees `Step`s only. An adapter per runner makes them: `runner_v1` for the
runner of the CPU engine and of older GPU servers, `runner_v2` for Model Runner V2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec

from microedit_vllm.engine.request_plan import RequestPlan
from microedit_vllm.errors import MicroEditError


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
        index: its row in the step's block table.
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
            follows.
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
            MicroEditError: see `followed_group`.
        """

    def attach(
        self,
        on_step: Callable[[Step], bool],
        after_step: Callable[[], None],
        on_new_request: Callable[[RequestState], None],
    ) -> None:
        """Call back around every real forward, never for profiling, warm-up or capture.

        `on_new_request` is called once per request; `on_step` before the runner chooses a CUDA
        graph for the step, and where it returns True, the step must not run in a full graph;
        `after_step` once the forward has returned.
        """


def followed_group(kv_cache_config: Any) -> tuple[int, int]:
    """The KV cache group that the state follows: its index and its number of slots.

    The first one with full attention only, because it keeps every token of a running request.

    Raises:
        MicroEditError: there is none: the state of old tokens would be freed with their KV.
    """
    for group, candidate in enumerate(kv_cache_config.kv_cache_groups):
        spec = candidate.kv_cache_spec
        specs = getattr(spec, "kv_cache_specs", {"": spec}).values()
        if all(isinstance(each, FullAttentionSpec) for each in specs):
            return group, kv_cache_config.num_blocks * spec.block_size
    raise MicroEditError(
        "the model has no layer with full attention, so the KV cache forgets the decision; "
        "such models are not supported"
    )
