"""SAE Lens' folder, `cfg.json` and `sae_weights.safetensors`, of versions 1 to 6.

Source: SAE Lens 6.18, `saes/*.py` (forward passes) and `handle_pre_6_0_config` (older configs).
"""

from pathlib import Path

import torch
from torch import Tensor

from microedit_trainer.sae_import.config_file import ConfigFile
from microedit_trainer.sae_import.hook_points import layer_of
from microedit_trainer.sae_import.published import Activation, PublishedSae
from microedit_vllm.artifact.tensors import expect, read_tensors
from microedit_vllm.errors import MicroEditError

WEIGHTS = "sae_weights.safetensors"
_CONFIG = "cfg.json"
_SCALER = "activation_scaler.json"


def read(folder: Path, norm_scale: float | None = None) -> PublishedSae:
    """Read a folder.

    Args:
        norm_scale: what z is multiplied by, where the folder does not store it.

    Raises:
        MicroEditError: damaged, not an SAE of the residual stream, or of a kind that editing
            cannot use.
    """
    config = ConfigFile.read(folder / _CONFIG)
    about = config.part("metadata") if "metadata" in config.fields else config
    hook = about.text("hook_name") or about.text("hook_point")  # the second before version 3
    layer = None if hook is None else layer_of(hook)
    activation, k = _activation(config)
    scale, is_assumed = _scale(config, about, folder, norm_scale)
    path = folder / WEIGHTS
    tensors = read_tensors(path)
    W_enc = expect(tensors, "W_enc", (config.count("d_in"), config.count("d_sae")), path)
    d, n = W_enc.shape
    _refuse_finetuned(tensors, path)
    threshold = None
    if _architecture(config) == "gated":
        W_enc, b_enc, threshold = _gated(tensors, W_enc, path)
    else:
        b_enc = expect(tensors, "b_enc", (n,), path)
        if activation == "jumprelu":
            threshold = expect(tensors, "threshold", (n,), path)
    return PublishedSae(
        W_enc=W_enc.T.contiguous(),
        b_enc=b_enc,
        W_dec=expect(tensors, "W_dec", (n, d), path),
        b_dec=expect(tensors, "b_dec", (d,), path),
        activation=activation,
        format="SAE Lens",
        k=k,
        threshold=threshold,
        subtracts_b_dec=config.flag("apply_b_dec_to_input", True),
        ranks_by_norm=config.flag("rescale_acts_by_decoder_norm", False),
        scale_in=scale,
        scale_out=scale,
        scale_is_assumed=is_assumed,
        layer=layer,
        model=about.text("model_name"),
    )


def _architecture(config: ConfigFile) -> str:
    return config.text("architecture") or "standard"


def _activation(config: ConfigFile) -> tuple[Activation, int | None]:
    architecture = _architecture(config)
    function = config.text("activation_fn") or config.text("activation_fn_str") or "relu"
    if architecture == "topk" or function == "topk":
        if architecture not in ("topk", "standard"):
            raise MicroEditError(f"{config.path}: a Top-k in a {architecture} SAE is not supported")
        # Before version 6 k stands among the arguments of the activation function.
        k = config.part("activation_fn_kwargs").count("k") or config.count("k")
        return "topk", config.need("k", k)
    if function != "relu":
        raise MicroEditError(f"{config.path}: activation {function!r}; editing needs ReLU or Top-k")
    if architecture == "standard":
        return "relu", None
    if architecture in ("jumprelu", "gated"):
        return "jumprelu", None
    raise MicroEditError(
        f"{config.path}: architecture {architecture!r}; editing can use standard, topk, and with "
        "--ignore-thresholds jumprelu and gated"
    )


def _gated(tensors: dict[str, Tensor], W_enc: Tensor, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """A gated SAE's magnitude path, and the magnitude above which the gate is open.

    Both paths share W_enc up to a factor e^r per latent, so a gate is a threshold:
    x·W_enc + b_gate > 0 where the magnitude's pre-activation exceeds b_mag − e^r·b_gate.
    """
    n = W_enc.shape[1]
    r_mag, b_mag, b_gate = (expect(tensors, t, (n,), path) for t in ("r_mag", "b_mag", "b_gate"))
    factor = r_mag.double().exp()
    threshold = b_mag.double() - factor * b_gate.double()
    return W_enc.float() * factor.float(), b_mag, threshold


def _refuse_finetuned(tensors: dict[str, Tensor], path: Path) -> None:
    # Versions 1 to 3 stored it even where it was not used: all ones.
    scaling = tensors.get("scaling_factor")
    if scaling is not None and not bool((scaling == torch.ones_like(scaling)).all()):
        raise MicroEditError(f"{path}: a finetuned scaling_factor of the latents is not supported")


def _scale(
    config: ConfigFile, about: ConfigFile, folder: Path, norm_scale: float | None
) -> tuple[float, bool]:
    """What z is multiplied by, and whether that only stands for a norm of each token's own."""
    kind = config.fields.get("normalize_activations")
    kind = {None: "none", False: "none", True: "expected_average_only_in"}.get(kind, kind)
    if _is_rescaled_mistral(config, about):
        kind = "constant_norm_rescale"
    if kind == "constant_norm_rescale":
        if norm_scale is None:
            raise MicroEditError(
                "the SAE scales each token to the norm √d, which editing cannot represent; "
                "--norm-scale √d/NORM takes one scale for all, with the model's usual NORM at "
                "that layer (then run `microedit sae check`)"
            )
        return norm_scale, True
    if kind == "layer_norm":
        raise MicroEditError(
            "the SAE normalises each token to mean 0 and deviation 1 (layer_norm), which editing "
            "cannot represent; use an SAE without it"
        )
    if kind == "expected_average_only_in":
        stored = config.number("norm_scaling_factor") or _stored_scaler(folder)
        if stored is None and norm_scale is None:
            raise MicroEditError(
                "the SAE scales its input (expected_average_only_in) and the folder does not say "
                "by what; name its norm_scaling_factor with --norm-scale"
            )
        return stored or norm_scale or 1.0, False
    if kind != "none":
        raise MicroEditError(f"{config.path}: normalize_activations {kind!r} is not known")
    is_said = "normalize_activations" in config.fields
    return 1.0 if is_said else norm_scale or 1.0, False


def _stored_scaler(folder: Path) -> float | None:
    path = folder / _SCALER
    return ConfigFile.read(path).number("scaling_factor") if path.exists() else None


def _is_rescaled_mistral(config: ConfigFile, about: ConfigFile) -> bool:
    """SAE Lens' release `mistral-7b-res-wg` (the paper's), whose own configs leave its norm out.

    SAE Lens' registry overrides them with constant_norm_rescale.
    """
    hooks = {f"blocks.{layer}.hook_resid_pre" for layer in (8, 16, 24)}
    return (
        about.text("model_name") == "mistral-7b"
        and config.count("d_sae") == 65536
        and about.text("hook_name") in hooks
    )
