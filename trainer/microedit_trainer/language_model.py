"""A frozen Hugging Face causal LM that can be cut behind one decoder layer."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microedit_vllm.errors import MicroEditError


class _Reached(Exception):
    """Raised by the hook behind the cut, so that the layers above never run."""


@dataclass(frozen=True)
class LanguageModel:
    """Model and tokenizer, with the residual stream z after decoder layer `layer` as the cut.

    `lower` runs the layers up to the cut, `upper` those above it. Both drive the model's own
    forward, so that masks, positions and scalings are the architecture's.
    """

    model: Any
    tokenizer: Any
    name: str
    folder: Path
    decoder_layers: nn.ModuleList

    @classmethod
    def load(cls, name: str, dtype: str = "auto", device: str | None = None) -> "LanguageModel":
        """Load a folder or a hub id.

        Args:
            dtype: "auto" takes the checkpoint's own, which is what vLLM serves.

        Raises:
            MicroEditError: no such model, or not a causal language model.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = resolve_folder(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise MicroEditError(
                f"cannot load a causal language model from {name}: "
                f"{reason[0] if reason else type(error).__name__}"
            ) from error
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            # transformers' default attention leaves Gemma 2's cap out; vLLM's does not.
            model.set_attn_implementation("eager")
        model = model.to(device).eval()
        model.requires_grad_(False)
        return cls(model, tokenizer, name, folder, find_decoder_layers(model))

    @property
    def decoder(self) -> Any:
        """The text model below the output head, also where an image encoder stands beside it."""
        return self.model.get_decoder()

    @property
    def num_layers(self) -> int:
        return len(self.decoder_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def max_length(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    @property
    def device(self) -> torch.device:
        """Where z is taken in: the embedding may wait elsewhere, the output head never does."""
        return self.model.get_output_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder_layers.parameters()).dtype

    def check_layer(self, layer: int) -> None:
        """Refuse a layer that the model does not have.

        Raises:
            MicroEditError: out of range.
        """
        if not 0 <= layer < self.num_layers:
            raise MicroEditError(
                f"layer {layer} does not exist: {self.name} has layers 0 to {self.num_layers - 1}"
            )

    @torch.no_grad()
    def lower(self, input_ids: Tensor, layer: int) -> Tensor:
        """z after decoder layer `layer`: [B, S] int64, right-padded → [B, S, d], model dtype.

        Causal attention keeps right padding away from real tokens, so no mask is needed.
        """
        caught: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        hook = self.decoder_layers[layer].register_forward_hook(stop)
        try:
            self.decoder(input_ids=input_ids.to(self.device), use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return caught[0]

    def upper(self, z: Tensor, layer: int, **inputs: Any) -> Tensor:
        """Final hidden states from z: [B, S, d] → [B, S, d]; differentiable in z.

        Args:
            inputs: what else the model's own forward shall get: a cache, a mask, positions.
        """
        with self._injected(z, layer):
            # What is embedded does not matter: it never gets past the replaced layers.
            inputs = {"inputs_embeds": z, "use_cache": False} | inputs
            return self.decoder(**inputs).last_hidden_state

    @contextmanager
    def lower_offloaded(self, layer: int) -> Iterator[None]:
        """Meanwhile the layers up to `layer` wait in the CPU's memory, and so does the token
        embedding unless it is the output head as well: `upper` and `logits` run, `lower` does not.
        """
        embedding = self.model.get_input_embeddings()
        is_tied = embedding.weight is self.model.get_output_embeddings().weight
        waiting = [*self.decoder_layers[: layer + 1], *([] if is_tied else [embedding])]
        with _on_cpu(waiting, self.device):
            yield

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """Meanwhile the whole model waits in the CPU's memory."""
        with _on_cpu([self.model], self.device):
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Output logits: [N, d] final hidden states → [N, vocabulary], fp32."""
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden).float()
        # Cohere multiplies, Granite divides, Gemma caps. By a 1 neither is done: over a whole
        # vocabulary, with a gradient, it costs.
        factor = getattr(config, "logit_scale", None) or 1.0
        if factor != 1.0:
            logits = logits * factor
        divisor = getattr(config, "logits_scaling", None) or 1.0
        if divisor != 1.0:
            logits = logits / divisor
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    @contextmanager
    def _injected(self, z: Tensor, layer: int) -> Iterator[None]:
        """Layers up to the cut pass z on instead of computing it."""

        def passes(_hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return z

        replaced = self.decoder_layers[: layer + 1]
        for module in replaced:
            module.forward = passes  # an instance attribute shadows the method
        try:
            yield
        finally:
            for module in replaced:
                del module.forward


@contextmanager
def _on_cpu(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    try:
        for module in modules:
            module.to("cpu")
        yield
    finally:
        for module in modules:
            module.to(device)


def resolve_folder(name: str) -> Path:
    """The folder of a model: itself, or the hub id's snapshot in the local cache or from the hub.

    Raises:
        MicroEditError: neither a folder nor a hub id that can be had.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", os.sep)) or name.count("/") > 1:
        raise MicroEditError(f"{name} is not a model folder; name a folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        raise MicroEditError(
            f"{name} is neither a folder nor a model that the hub gives "
            f"({type(error).__name__}); check the name or the network"
        ) from error


def find_decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers, whatever the architecture calls it.

    Raises:
        MicroEditError: no list of the configured length, or layers that take more than z (Gemma 3n
            and 4 give each layer embeddings of the tokens, which `upper` does not have).
    """
    config = model.config.get_text_config()
    if getattr(config, "hidden_size_per_layer_input", None):
        raise MicroEditError(
            f"{type(model).__name__} gives embeddings of its tokens to every layer; "
            "such models cannot be edited"
        )
    count = config.num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise MicroEditError(f"{type(model).__name__} has no list of {count} decoder layers")


def pad_batch(sequences: Sequence[Sequence[int]], pad: int = 0) -> Tensor:
    """Right-padded [B, S] int64."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in sequences])


def length_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]


Progress = Callable[[int], None]
