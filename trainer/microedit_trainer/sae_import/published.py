"""What a published SAE computes, whatever its library calls the parts."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["relu", "topk", "jumprelu"]


@dataclass(frozen=True)
class PublishedSae:
    """An SAE of a residual stream z, [d], as its publisher runs it:

        x = scale_in·z − b_dec   (− b_dec only where `subtracts_b_dec`)
        h = f(W_enc·x + b_enc)
        ẑ = (h·W_dec + b_dec) / scale_out

    Attributes:
        W_enc: [n, d], one row per latent; b_enc: [n]; W_dec: [n, d]; b_dec: [d]; any float dtype.
        activation: f. "relu"; "topk": the k largest, then ReLU; "jumprelu": ReLU, and 0 where the
            pre-activation does not exceed the latent's threshold.
        k: of "topk"; for another f the k that training used, where the folder names one.
        threshold: of "jumprelu", [n].
        ranks_by_norm: f sees pre-activations times ‖W_dec[i]‖, and its result is divided by that.
        scale_is_assumed: the publisher scales each token by its own norm, and the user asked for
            one scale for all.
        layer: decoder layer whose output z is, from 0; None where the folder does not say.
        format: name of the format; model: name of the model, where the folder says it.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation
    format: str
    k: int | None = None
    threshold: Tensor | None = None
    subtracts_b_dec: bool = True
    ranks_by_norm: bool = False
    scale_in: float = 1.0
    scale_out: float = 1.0
    scale_is_assumed: bool = False
    layer: int | None = None
    model: str | None = None
