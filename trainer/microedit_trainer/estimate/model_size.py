"""How large a model's parts are, from its configuration alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microedit_trainer.language_model import find_decoder_layers
from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class ModelSize:
    """Parameters by part, and the widths of activations.

    Attributes:
        embedding: of tokens. head: the output head's; 0 where it is the embedding.
        layers: of each decoder layer. rest: norms, positions, an image encoder.
        inner: width of the MLP's hidden layer; vocabulary: of the logits.
    """

    embedding: int
    head: int
    layers: tuple[int, ...]
    rest: int
    hidden_size: int
    inner: int
    vocabulary: int
    dtype: torch.dtype

    @classmethod
    def read(cls, folder: Path, dtype: str = "auto") -> "ModelSize":
        """Build the model without its weights and count.

        Raises:
            MicroEditError: not a causal language model that can be edited.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise MicroEditError(
                f"cannot load a causal language model from {folder}: "
                f"{reason[0] if reason else type(error).__name__}"
            ) from error
        stored = config.get_text_config().dtype or config.dtype or torch.float32
        return cls.of(model, stored if dtype == "auto" else getattr(torch, dtype, stored))

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> "ModelSize":
        """Count a model's parameters; its weights may be on the meta device."""
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        layers = tuple(_count(layer.parameters()) for layer in find_decoder_layers(model))
        own_head = 0 if head.weight is embedding else _count(head.parameters())
        config = model.config.get_text_config()
        width = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        total = _count(model.parameters())
        return cls(
            embedding=embedding.numel(),
            head=own_head,
            layers=layers,
            rest=total - embedding.numel() - own_head - sum(layers),
            hidden_size=width,
            inner=inner or 4 * width,
            vocabulary=config.vocab_size,
            dtype=dtype,
        )

    @property
    def value_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def parameters(self) -> int:
        return self.embedding + self.head + sum(self.layers) + self.rest

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.value_bytes

    def waiting(self, layer: int) -> int:
        """Bytes of what `LanguageModel.lower_offloaded` sends away."""
        embedding = self.embedding if self.head else 0
        return (embedding + self.below(layer)) * self.value_bytes

    def below(self, layer: int) -> int:
        """Parameters of the layers up to `layer`."""
        return sum(self.layers[: layer + 1])

    def above(self, layer: int) -> int:
        """Parameters of the layers above `layer`."""
        return sum(self.layers[layer + 1 :])

    def activations(self, tokens: int) -> int:
        """Bytes of one layer's activations without a gradient, generously."""
        return tokens * (8 * self.hidden_size + 3 * self.inner) * self.value_bytes

    def gradients(self, tokens: int, layer: int) -> int:
        """Bytes that the layers above `layer` keep for a backward pass in z."""
        per_token = 12 * self.hidden_size + 5 * self.inner
        count = len(self.layers[layer + 1 :])
        return tokens * per_token * count * self.value_bytes + self.activations(tokens)

    def logits(self, tokens: int) -> int:
        """Bytes of logits, their softmax and its gradient at so many positions."""
        return tokens * self.vocabulary * (2 * self.value_bytes + 3 * 4)

    def in_dtype(self, dtype: torch.dtype) -> "ModelSize":
        return replace(self, dtype=dtype)


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
