"""A decode step of a LLaMA-shaped model in plain torch: one token per sequence, random weights.

It has no rotary embedding and no sampling, and attention reads a dense cache: a real step takes
longer, so that a share of this one is rather too large than too small.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.kernel_bench.adapter import Inputs
from benchmarks.kernel_bench.shapes import ModelShape
from benchmarks.kernel_bench.timing import Launch


class Layer:
    """Pre-norm decoder layer with grouped-query attention and a gated MLP."""

    def __init__(self, shape: ModelShape, inputs: Inputs) -> None:
        self._shape = shape
        attention = shape.heads * shape.head_dim
        qkv = attention + 2 * shape.kv_heads * shape.head_dim

        def weight(out: int, width: int) -> Tensor:
            return inputs.normal(out, width, std=width**-0.5)

        self.norms = torch.ones(2, shape.d, dtype=torch.bfloat16, device=inputs.device)
        self.qkv, self.o = weight(qkv, shape.d), weight(shape.d, attention)
        self.gate_up, self.down = weight(2 * shape.ffn, shape.d), weight(shape.d, shape.ffn)

    def __call__(self, x: Tensor, cache: Tensor) -> Tensor:
        """x: [M, d]; cache: [2, M, kv_heads, context, head_dim], its last place overwritten."""
        x = x + linear(self._attention(x, cache), self.o)
        gate, up = linear(rms_norm(x, x.shape[-1:], self.norms[1]), self.gate_up).chunk(2, -1)
        return x + linear(silu(gate) * up, self.down)

    def _attention(self, x: Tensor, cache: Tensor) -> Tensor:
        s, M = self._shape, len(x)
        qkv = linear(rms_norm(x, x.shape[-1:], self.norms[0]), self.qkv)
        q, kv = qkv.split([s.heads * s.head_dim, 2 * s.kv_heads * s.head_dim], -1)
        cache[:, :, :, -1] = kv.view(M, 2, s.kv_heads, s.head_dim).transpose(0, 1)
        # The query heads of a group stand as queries of their one key head, which is read once.
        q = q.view(M, s.kv_heads, s.heads // s.kv_heads, s.head_dim)
        return scaled_dot_product_attention(q, cache[0], cache[1]).reshape(M, -1)


class DecodeStep:
    """Weights of all layers; `at` gives a step of so many sequences."""

    def __init__(self, shape: ModelShape, inputs: Inputs) -> None:
        self._shape, self._inputs = shape, inputs
        self._layers = [Layer(shape, inputs) for _ in range(shape.layers)]
        self._lm_head = inputs.normal(shape.vocab, shape.d, std=shape.d**-0.5)

    def at(self, M: int) -> "Step":
        s, normal = self._shape, self._inputs.normal
        caches = [normal(2, M, s.kv_heads, s.context, s.head_dim) for _ in self._layers]
        return Step(self, normal(M, s.d), caches)

    def run(self, x: Tensor, caches: list[Tensor], after_sae_layer: Launch | None) -> Tensor:
        """Logits [M, vocab]."""
        for i, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            x = layer(x, cache)
            if i == self._shape.sae_layer and after_sae_layer is not None:
                after_sae_layer()
        norm = self._layers[0].norms[0]
        return linear(rms_norm(x, x.shape[-1:], norm), self._lm_head)

    def weight_bytes(self) -> int:
        """Read once a step."""
        layer = self._layers[0]
        each = sum(w.nbytes for w in (layer.norms, layer.qkv, layer.o, layer.gate_up, layer.down))
        return each * len(self._layers) + self._lm_head.nbytes


class Step:
    """One step over its own cache: launch it plain, or with kernels behind the SAE's layer."""

    def __init__(self, model: DecodeStep, x: Tensor, caches: list[Tensor]) -> None:
        self._model, self._x, self._caches = model, x, caches

    def launch(self, after_sae_layer: Launch | None = None) -> Tensor:
        return self._model.run(self._x, self._caches, after_sae_layer)

    def bytes(self) -> int:
        """Of weights and cached tokens."""
        return self._model.weight_bytes() + sum(cache.nbytes for cache in self._caches)
