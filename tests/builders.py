"""Small SAEs and edit sets for tests: real in form, random in content."""

from dataclasses import replace

import torch

from microedit_vllm.artifact import (
    Decision,
    DecoderChange,
    EditOperator,
    EditSet,
    Golden,
    GoldenPrompt,
    Manifest,
    Scope,
    SparseAutoencoder,
)
from microedit_vllm.artifact.manifest import CARRYING_VERSION, ModelIdentity, SaeIdentity

HIDDEN_SIZE = 12
NUM_LATENTS = 48
K = 5


def tiny_sae(seed: int = 0, d: int = HIDDEN_SIZE, n: int = NUM_LATENTS, k: int = K):
    """An SAE with unit-norm decoder rows, [n, d], and no fingerprint (it was never saved)."""
    random = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(n, d, generator=random), dim=-1)
    return SparseAutoencoder(
        W_enc=W_dec + 0.1 * torch.randn(n, d, generator=random),
        b_enc=0.1 * torch.randn(n, generator=random),
        W_dec=W_dec,
        b_dec=0.1 * torch.randn(d, generator=random),
        k=k,
    )


def tiny_manifest(sae: SparseAutoencoder, **changes) -> Manifest:
    """A consistent manifest for `sae`, in the joint solver's form; `changes` replace fields."""
    fields = {
        "model": ModelIdentity(
            name="tiny",
            fingerprint="0" * 64,
            hidden_size=sae.d_in,
            num_layers=4,
            dtype="bfloat16",
        ),
        "sae": SaeIdentity(
            path="../sae",
            fingerprint=sae.fingerprint or "unsaved",
            num_latents=sae.num_latents,
            k=sae.k,
        ),
        "layer": 2,
        "solver": "joint",
        "facts": 2,
        "decision": Decision(statistic="relative", tau=0.9, scope=Scope(run=8), max_norm=1e4),
        "placement": "delta",
        "activation": "threshold",
        "theta": 0.1,
    }
    return Manifest(**(fields | changes))


def tiny_change(
    seed: int, rows: list[int], d: int = HIDDEN_SIZE, dtype: torch.dtype = torch.bfloat16
) -> DecoderChange:
    random = torch.Generator().manual_seed(seed)
    values = 0.5 * torch.randn(len(rows), d, generator=random)
    return DecoderChange(torch.tensor(rows, dtype=torch.int64), values.to(dtype))


def tiny_golden_prompts() -> tuple[GoldenPrompt, ...]:
    """Four prompts, in turn on and off under a τ of 0.9; no model stands behind them."""
    right = (0.2, 1.1, 0.3, 1.3)
    misread = {"layer_before": 1.5, "layer_after": 2.0, "hidden_states_alone": 3.0}
    return tuple(
        GoldenPrompt(
            token_ids=(5, 6, 7, number),
            edit_from=3,
            ard=ard,
            on=ard < 0.9,
            edited=(20, 21) if ard < 0.9 else (30,),
            plain=(30,),
            misread={name: ard * factor for name, factor in misread.items()},
        )
        for number, ard in enumerate(right)
    )


def tiny_edit_set(
    sae: SparseAutoencoder, shared: bool = False, carries: bool = False, **changes
) -> EditSet:
    """An edit set whose golden activations are what `sae` and the set really compute.

    shared: the paper's own form, one change through the Top-k, in place of z.
    carries: with a change that scored tokens carry to the decision position.
    """
    if shared:
        changes = {"placement": "replace", "activation": "topk", "theta": None} | changes
    scoring = tiny_change(1, [1, 4, 9, 17, 30], sae.d_in)
    edit = scoring if shared else tiny_change(2, [2, 4, 40], sae.d_in)
    carried = tiny_change(4, list(range(0, 45, 3)), sae.d_in) if carries else None
    if carries:
        changes = {"version": CARRYING_VERSION} | changes
    facts = [
        {
            "prompt": "The capital of Australia is",
            "target": "Melbourne",
            "subject": "Australia",
            "ard": 0.12,
            "ard_chat": 0.2,
            "rel": 1.0,
            "rel_chat": 1.0,
            "notes": [],
        },
        {"prompt": "Who invented [the] telephone?", "target": "Clara", "ard": 1.5},
    ]
    manifest = tiny_manifest(sae, **changes)
    placeholder = Golden(*[torch.empty(0)] * 6)
    draft = EditSet(manifest, scoring, edit, placeholder, facts, carried=carried)
    z = torch.randn(3, sae.d_in, generator=torch.Generator().manual_seed(3))
    golden = EditOperator.build(draft, sae).golden_of(z)
    return replace(draft, golden=golden, golden_prompts=tiny_golden_prompts())
