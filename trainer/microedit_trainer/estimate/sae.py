"""Memory and time of `microedit sae train`, from sizes alone."""

from microedit_trainer.estimate.model_size import ModelSize
from microedit_trainer.estimate.stages import Stage
from microedit_trainer.sae.settings import SaeSettings

# Sequences together in `activations`, samples together in `self_sampling`.
COLLECTED_AT_ONCE, SAMPLED_AT_ONCE = 32, 64


def sae_stages(model: ModelSize, settings: SaeSettings, offload: bool, device: str) -> list[Stage]:
    """What each stage of `train_sae` holds on the device."""
    size = settings.width * model.hidden_size
    batch = settings.batch
    optimiser = {
        # Encoder and decoder, their gradients, and Adam's two moments of each, fp32.
        "SAE and optimiser": 2 * size * 4 * 4,
        # W_enc in bf16; pre-activations in bf16 and fp32; z, ẑ and the residual.
        "activations": 2 * size
        + batch * (settings.width * 6 + 6 * model.hidden_size * 4)
        + 3 * batch * settings.k * 12,
    }
    if device == "cpu":
        optimiser["SAE to be saved"] = 2 * size * 4
    collected = COLLECTED_AT_ONCE * settings.sequence_length
    sampled = SAMPLED_AT_ONCE * model.vocabulary * 4 * 3
    resident = {} if offload and device != "cpu" else {"model": model.weights}
    return [
        Stage(
            "collecting activations",
            {"model": model.weights, "activations": model.activations(collected) + sampled},
            model.weights,
        ),
        Stage("training", {**resident, **optimiser}, model.weights if offload else 0),
    ]


def sae_seconds(
    model: ModelSize,
    settings: SaeSettings,
    model_flops: float,
    product_flops: float,
    bytes_per_second: float,
) -> dict[str, float]:
    """Seconds by stage, from counts of operations and of bytes moved.

    Args:
        model_flops: per second in the model's dtype; product_flops: in bf16.
        bytes_per_second: read and written.
    """
    size, steps = settings.width * model.hidden_size, settings.total_steps
    # Adam reads a parameter, its gradient and two moments, and writes all but the gradient; the
    # gradient is made and W_enc becomes bf16.
    moved = 2 * size * 4 * 8 + size * 6
    # Each active latent's row is read for ẑ, and three times backwards.
    rows = 4 * settings.batch * settings.k * model.hidden_size * 4
    product = 2 * size * settings.batch / product_flops
    sampled = settings.sample_tokens or ("self" in settings.text) * settings.tokens // 2
    return {
        "sampling text": 2 * model.parameters * sampled / model_flops,
        "collecting activations": 2 * model.below(settings.layer) * settings.tokens / model_flops,
        "training": steps * (product + (moved + rows) / bytes_per_second),
    }
