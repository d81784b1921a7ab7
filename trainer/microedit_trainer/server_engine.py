"""Evaluation through a running vLLM server: what is measured is what is served.

Teacher forcing over HTTP: the prompt with its answer goes in as token ids, `microedit_edit_from`
names the decision position, and `prompt_logprobs` gives back the greedy token at each place.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microedit_trainer.contexts import PromptTokens
from microedit_trainer.evaluation import Outcome
from microedit_vllm.served_model import ServedModel


@dataclass(frozen=True)
class ServerEngine(ServedModel):
    """A MicroEdit server that runs the prompts."""

    concurrency: int = 16

    def edited(self, prompts: Sequence[PromptTokens]) -> list[Outcome]:
        """Answers, ARD and switch with the edit set."""

        def ask(prompt: PromptTokens) -> Outcome:
            completion = self._complete(prompt, {"microedit_edit_from": prompt.edit_from})
            decision = self.decision(completion.id)
            return Outcome(_greedy(completion, prompt), decision["ard"], decision["on"])

        return self._spread(ask, prompts)

    def plain(self, prompts: Sequence[PromptTokens]) -> list[Tensor]:
        """Answers with the edit set turned off for the request."""

        def ask(prompt: PromptTokens) -> Tensor:
            return _greedy(self._complete(prompt, {"microedit": "off"}), prompt)

        return self._spread(ask, prompts)

    def perplexities(self, prompts: Sequence[PromptTokens]) -> None:
        """Not asked of a server: its likelihoods are of the dtype and kernels that it serves."""

    def _complete(self, prompt: PromptTokens, options: dict[str, Any]) -> Any:
        return self.client.completions.create(
            model=self.model,
            prompt=[*prompt.prompt_ids, *prompt.answer_ids],
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": 1, "vllm_xargs": options},
        )

    def _spread(
        self, ask: Callable[[PromptTokens], Any], prompts: Sequence[PromptTokens]
    ) -> list[Any]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, prompts))


def _greedy(completion: Any, prompt: PromptTokens) -> Tensor:
    """The first-ranked token at each of the answer's places: [A] int64."""
    places = completion.choices[0].prompt_logprobs[prompt.edit_from + 1 :]
    best = [next(int(t) for t, entry in place.items() if entry["rank"] == 1) for place in places]
    return torch.tensor(best)
