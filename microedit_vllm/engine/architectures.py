"""Which of vLLM's architectures can be edited, and why the others cannot.

Read from the sources of vLLM and transformers (`model_source`), so that every entry of the
registry has an answer on every machine. docs/architectures.md is this module's answer to all of
them.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from microedit_vllm.engine.decoder_stack import find_stack
from microedit_vllm.engine.model_source import ModelClass, find_class
from microedit_vllm.engine.stream_form import (
    Form,
    UnreadableError,
    layer_form,
    scales_in_float16,
)
from microedit_vllm.errors import MicroEditError

_MODELS = "vllm.model_executor.models"
_BACKEND = "transformers"
_STATEFUL_BASES = {"IsHybrid", "HasInnerState", "IsAttentionFree"}
_STATEFUL = (
    "it has Mamba, linear-attention or convolution layers, which keep state outside the KV cache "
    "that the switch follows"
)
_MULTIMODAL = "multimodal: what an edit does to a prompt with images or sound is not defined"

_ENCODER_DECODER = "an encoder-decoder: it has two streams"
# The registry has them among the multimodal ones, behind a comment.
_ENCODER_DECODERS = {
    "CohereAsrForConditionalGeneration",
    "NemotronParseForConditionalGeneration",
    "WhisperForConditionalGeneration",
}

# What the sources say to a reader, and not to `decoder_stack`.
_READ_BY_HAND: dict[str, Form | str] = {
    # Their own norms hand the second value on unread (`commandr.py`, `cohere2_moe.py`).
    "CohereForCausalLM": Form.FIRST,
    "Cohere2ForCausalLM": Form.FIRST,
    "Cohere2MoeForCausalLM": Form.FIRST,
    # The norm of the sum stands in Plamo3Model, the loop in Plamo3Decoder.
    "Plamo3ForCausalLM": Form.FUSED,
    "HrmTextForCausalLM": "HrmTextModel runs its layers several times for each token",
}


@dataclass(frozen=True)
class Support:
    """What can be said about an architecture.

    Attributes:
        form: where the residual stream is in its layers' output; None where it is refused.
        reason: why it is refused; empty where it is supported.
        float16: False where the model scales its stream in that dtype.
    """

    form: Form | None
    reason: str = ""
    float16: bool = True

    @property
    def supported(self) -> bool:
        return self.form is not None


def _refused(reason: str) -> Support:
    return Support(None, reason)


def registry() -> dict[str, tuple[str, str]]:
    """vLLM's registry: architecture → (module, class)."""
    from vllm.model_executor.models.registry import _VLLM_MODELS

    return dict(_VLLM_MODELS)


@cache
def classify(architecture: str) -> Support:
    """Whether a registry entry can be edited; for an unknown name, whether transformers' can."""
    from vllm.model_executor.models import registry as entries

    if architecture in entries._SPECULATIVE_DECODING_MODELS:
        return _refused("a draft model or head for speculative decoding")
    if architecture in entries._MULTIMODAL_MODELS:
        return _refused(_ENCODER_DECODER if architecture in _ENCODER_DECODERS else _MULTIMODAL)
    if architecture in entries._TRANSFORMERS_BACKEND_MODELS:
        return _refused("a name of vLLM's backend; the checkpoint's own architecture decides")
    if architecture in entries._TEXT_GENERATION_MODELS:
        module, name = entries._TEXT_GENERATION_MODELS[architecture]
        if module.startswith("vllm."):
            return _refused("vLLM has an implementation for each platform; none was read")
        return _read(architecture, find_class(f"{_MODELS}.{module}", name))
    if entries._VLLM_MODELS.get(architecture, (_BACKEND,))[0] == _BACKEND:
        return classify_transformers(architecture)
    return _refused("pooling: it embeds, classifies or ranks, and generates no text")


@cache
def classify_transformers(architecture: str) -> Support:
    """The same for an architecture that runs in transformers' own code, inside vLLM."""
    import transformers

    model = getattr(transformers, architecture, None)
    if model is None:
        return _refused("it is neither in vLLM's registry nor in the installed transformers")
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return _refused(_MULTIMODAL)
    return _read(architecture, find_class(model.__module__, architecture))


def _read(architecture: str, model: ModelClass | None) -> Support:
    if model is None:
        return _refused("its source was not found")
    bases = model.base_names()
    if bases & _STATEFUL_BASES:
        return _refused(_STATEFUL)
    if "SupportsMultiModal" in bases:
        return _refused(_MULTIMODAL)
    known = _READ_BY_HAND.get(architecture)
    if isinstance(known, str):
        return _refused(known)
    try:
        stack = find_stack(model)
        form = known or stack.form()
    except UnreadableError as error:
        return _refused(f"the residual stream cannot be told from its source: {error}")
    return Support(form, float16=not any(map(scales_in_float16, stack.layers)))


def form_of(layer: nn.Module) -> Form:
    """The form of a decoder layer as it was loaded.

    Raises:
        MicroEditError: it cannot be told from the class's source.
    """
    cls = type(layer)
    known = find_class(cls.__module__, cls.__name__)
    if known is None:
        raise MicroEditError(
            f"the decoder layers are {cls.__module__}.{cls.__name__}, which is neither vLLM's nor "
            "transformers'; such models are not supported"
        )
    try:
        return layer_form(known)
    except UnreadableError as error:
        raise MicroEditError(
            f"the residual stream cannot be told from the decoder layers' source: {error}"
        ) from None


def refuse_architecture(vllm_config: Any) -> None:
    """Refuse a model that edits cannot be served on, with the reason.

    Args:
        vllm_config: `vllm.config.VllmConfig`, complete.

    Raises:
        MicroEditError: the architecture, or what the configuration makes of it.
    """
    model = vllm_config.model_config
    architecture = model.architecture
    support = classify(architecture)
    if model.using_transformers_backend():
        architecture = model.architectures[0]
        support = classify_transformers(architecture)
    reason = support.reason or _dynamic_reason(vllm_config, support)
    if reason:
        raise MicroEditError(f"edits cannot be served on {architecture}: {reason}")


def _dynamic_reason(vllm_config: Any, support: Support) -> str:
    """What only the checkpoint and the flags tell."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    reasons = {
        _STATEFUL: model.is_hybrid or model.is_attention_free,
        _ENCODER_DECODER: model.is_encoder_decoder,
        _MULTIMODAL: model.is_multimodal_model,
        "it generates by diffusion": model.is_diffusion,
        "it scales its residual stream in float16; serve it in bfloat16": (
            not support.float16 and str(model.dtype) == "torch.float16"
        ),
        "LoRA adapters change the residual stream that the edits and their SAE were made for; "
        "leave --enable-lora out, or merge the adapter and edit the merged model": (
            vllm_config.lora_config is not None
        ),
        "rows are spread over ranks (sequence-parallel experts); leave expert parallelism out": (
            parallel.use_sequence_parallel_moe
        ),
        "--kv-sharing-fast-prefill leaves rows out of the upper layers": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
    }
    return next((reason for reason, is_so in reasons.items() if is_so), "")
