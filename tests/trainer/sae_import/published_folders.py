"""Synthetic SAEs in the exact layouts that their publishers use, with awkward numbers on purpose.

Decoder rows are not of unit norm, b_dec and the input are far from 0, and one latent has no
decoder row: whatever a reader forgets to fold shows.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, N, K = 10, 24, 4


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """SAE Lens' names and shapes: W_enc [d, n], b_enc [n], W_dec [n, d], b_dec [d]."""
    random = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(N, D, generator=random)
    W_dec = W_dec * (0.3 + 3 * torch.rand(N, 1, generator=random))
    W_dec[3] = 0
    return {
        "W_enc": 0.4 * torch.randn(D, N, generator=random),
        "b_enc": 0.3 * torch.randn(N, generator=random),
        "W_dec": W_dec,
        "b_dec": torch.randn(D, generator=random),
    }


def inputs(rows: int = 40) -> torch.Tensor:
    return 2 + 3 * torch.randn(rows, D, generator=torch.Generator().manual_seed(9))


def write_sparsify(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes) -> Path:
    """As in EleutherAI/sae-llama-3-8b-32x: `layers.N/` with these fields alone."""
    tensors = tensors or weights()
    folder.mkdir(parents=True)
    stored = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    save_file(stored, folder / "sae.safetensors")
    config = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "k": K,
        "signed": False,
        "d_in": D,
    }
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    return folder


def write_sae_lens(
    folder: Path, config: dict, tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors or weights(), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def version_3(**changes) -> dict:
    """A config as versions 3 to 5 write it: flat, with the training run's fields."""
    return {
        "architecture": "standard",
        "d_in": D,
        "d_sae": N,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "context_size": 256,
        "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_pre",
        "hook_layer": 8,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "Skylion007/openwebtext",
        "dataset_trust_remote_code": True,
        "normalize_activations": "none",
        "dtype": "torch.float32",
        "device": "cuda",
        "sae_lens_training_version": "3.13.0",
    } | changes


def version_6(**changes) -> dict:
    """A config as version 6 writes it: what is about the model stands in `metadata`."""
    return {
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.12.1",
            "sae_lens_training_version": "6.12.1",
            "model_name": "gemma-2-2b",
            "hook_name": "blocks.20.hook_resid_post",
            "hook_head_index": None,
            "prepend_bos": True,
        },
        "architecture": "standard",
    } | changes


def write_gemma_scope(
    root: Path, threshold: torch.Tensor, tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """`layer_20/width_16k/average_l0_71/params.npz` below the repository's folder."""
    folder = root / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays = {n: t.numpy() for n, t in ((tensors or weights()) | {"threshold": threshold}).items()}
    np.savez(folder / "params.npz", **arrays)
    return folder


def write_llama_scope(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes):
    """`Llama3_1-8B-Base-L15R-8x/`, in bf16 as published."""
    tensors = tensors or weights()
    (folder / "checkpoints").mkdir(parents=True)
    stored = {
        "encoder.weight": tensors["W_enc"].T.bfloat16().contiguous(),
        "encoder.bias": tensors["b_enc"].bfloat16(),
        "decoder.weight": tensors["W_dec"].T.bfloat16().contiguous(),
        "decoder.bias": tensors["b_dec"].bfloat16(),
    }
    save_file(stored, folder / "checkpoints" / "final.safetensors")
    config = {
        "device": "cuda:0",
        "seed": 42,
        "dtype": "torch.bfloat16",
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8,
        "d_model": D,
        "d_sae": N,
        "bias_init_method": "all_zero",
        "act_fn": "topk",
        "jump_relu_threshold": 0.52734375,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 17.125, "out": 17.125},
        "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "init_decoder_norm": 0.5,
        "lp": 1,
        "l1_coefficient": 8e-05,
        "top_k": K,
        "k_warmup_steps": 78125,
        "use_batch_norm_mse": True,
        "use_ghost_grads": False,
    }
    (folder / "hyperparams.json").write_text(json.dumps(config | changes))
    return folder
