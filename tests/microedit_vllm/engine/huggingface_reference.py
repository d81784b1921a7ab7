"""What an edited model answers, computed with transformers alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microedit_vllm.artifact import EditOperator, scored_span


@dataclass(frozen=True)
class Answer:
    """A greedy answer: token ids, and each one's log-probability."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class HuggingFaceReference:
    """A transformers model whose decoder layer `layer` can be edited.

    Attributes:
        layers: the list of decoder layers, named here and not found by the code under test.
    """

    model: Any
    layers: nn.ModuleList
    layer: int

    @torch.inference_mode()
    def z(self, tokens: list[int]) -> Tensor:
        """The residual stream behind `layer`: [S, d]."""
        caught: list[Tensor] = []
        hook = self.layers[self.layer].register_forward_hook(
            lambda module, args, output: caught.append(_stream(output))
        )
        try:
            self.model(torch.tensor([tokens]), use_cache=False)
        finally:
            hook.remove()
        return caught[0][0]

    def ard(self, operator: EditOperator, tokens: list[int]) -> float:
        """The decision's statistic for a prompt, decided at its last token."""
        decision = operator.edit_set.manifest.decision
        begin, end = scored_span(tokens, len(tokens) - 1, decision.scope, decision.turn)
        return float(operator.ard(*operator.distances(self.z(tokens)[begin:end])))

    @torch.inference_mode()
    def answer(self, prompt: list[int], steps: int, operator: EditOperator | None) -> Answer:
        """Greedy, one whole forward for each token; edited from the prompt's last token on."""
        tokens, logprobs = list(prompt), []
        last_only = {"use_cache": False, "logits_to_keep": 1}
        with self._edited(operator, len(prompt) - 1):
            for _ in range(steps):
                logits = self.model(**last_only, input_ids=torch.tensor([tokens])).logits[0, -1]
                best = int(logits.argmax())
                logprobs.append(float(logits.float().log_softmax(-1)[best]))
                tokens.append(best)
        return Answer(tokens[len(prompt) :], logprobs)

    @contextmanager
    def _edited(self, operator: EditOperator | None, first: int) -> Iterator[None]:
        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            z = _stream(output).clone()
            assert operator is not None
            z[:, first:] = operator.edited(z[:, first:]).to(z.dtype)
            return (z, *output[1:]) if isinstance(output, tuple) else z

        hook = None
        if operator is not None:
            hook = self.layers[self.layer].register_forward_hook(replace)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
