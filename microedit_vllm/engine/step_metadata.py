"""What a step is made of, as read from a model runner. One adapter per runner.

The rest of the engine sees `Step`s only; `runner_v1` and `runner_v2` know where a runner keeps the
numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from microedit_vllm.engine.step_plan import RequestState


@dataclass(frozen=True)
class StepRequest:
    """One request's share of a step; host numbers only.

    Attributes:
        state: our record of the request, made once; ends with vLLM's own.
        index: its row in the step's block table.
        first_row: its first row in the batch's hidden states.
        num_rows: rows that it has there.
        first_position: position of the first row's token in its sequence. Exact while the prompt
            is computed; from then on only beyond e.
    """

    state: RequestState
    index: int
    first_row: int
    num_rows: int
    first_position: int


@dataclass(frozen=True)
class Step:
    """A step's requests that ask for edits.

    Attributes:
        block_table: [rows, blocks] int32 on the device, of the KV group that the state follows.
        block_size: tokens per block; the token at position p of a request has KV slot
            block_table[index, p // block_size] * block_size + p % block_size.
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
        on_new_request: Callable[[RequestState], None],
    ) -> None:
        """Call `on_new_request` once per request and `on_step` before every real forward.

        Real ones only: not profiling, warm-up, capture, or the dummy steps of data parallelism.
        `on_step` runs before the step's CUDA graph is chosen; where it returns True the step runs
        in no FULL graph.
        """
