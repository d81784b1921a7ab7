"""What the ranks of tensor-parallel groups compute, each rank a process, over gloo."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from microedit_vllm.artifact import DecoderChange, EditOperator, SparseAutoencoder
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_edit_set, tiny_sae

SIZES = (2, 3)
# 47 latents part into shares of unequal size; 20 is more than a third of them.
CASES: dict[str, dict[str, Any]] = {
    "delta": {"k": 5},
    "carried": {"k": 5, "carries": True},
    "the paper's form": {"k": 5, "shared": True},
    "shares smaller than k": {"k": 20, "shared": True},
    "ties": {"k": 20, "shared": True, "integers": True},
}
TAU = 0.9


def make_operator(k: int, integers: bool = False, **form: bool) -> EditOperator:
    """A whole operator; of integers alone, so that sums are exact and many latents tie."""
    sae = tiny_sae(n=47, k=k)
    if integers:
        weights = (sae.W_enc * 3).round(), (sae.b_enc * 20).round()
        sae = SparseAutoencoder(*weights, sae.W_dec, torch.zeros_like(sae.b_dec), k)
    return EditOperator.build(tiny_edit_set(sae, **form), sae)


def make_rows(integers: bool = False) -> torch.Tensor:
    """z [7, d]."""
    z = torch.randn(7, 12, generator=torch.Generator().manual_seed(5))
    return (z * 2).round() if integers else z


def results(operator: EditOperator, case: str) -> dict[str, torch.Tensor]:
    """All that a step asks of an operator."""
    z = make_rows(CASES[case].get("integers", False))
    acts, indices = operator.encode(z)
    # More dimensions, as golden activations of several prompts have.
    deep_acts, _ = operator.encode(z[:6].view(2, 3, -1))
    dist, dist0 = operator.distances(z)
    found = {"acts": acts, "indices": indices, "dist": dist, "dist0": dist0}
    found |= {"edited": operator.edited(z), "deep": deep_acts.flatten(0, 1)}
    weights = torch.linspace(0, 1, len(z))[None]
    return found | {"carried": operator.carried_change(acts[None], indices[None], weights)}


def run_ranks(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By size of the group, what each of its ranks found."""
    ranks = max(SIZES)
    torch.multiprocessing.spawn(_rank, args=(ranks, str(folder)), nprocs=ranks)
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES
    }


def _rank(rank: int, ranks: int, folder: str) -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    from vllm.distributed.parallel_state import GroupCoordinator

    for size in SIZES:
        members = [list(range(size)), *([other] for other in range(size, ranks))]
        group = GroupCoordinator(members, rank, "gloo", True, group_name="ranks")
        if rank < size:
            torch.save(_found(group, rank), f"{folder}/{size}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _found(group: Any, rank: int) -> dict[str, Any]:
    from microedit_vllm.engine.parallel import ShardedOperator

    found: dict[str, Any] = {}
    for case, form in CASES.items():
        operator = ShardedOperator.shard(make_operator(**form), group, torch.device("cpu"))
        operator.check_golden()
        found[case] = results(operator, case)
    found["latents"] = operator.sae.num_latents
    # Rounding put the ranks on the two sides of τ.
    found["on"] = operator.is_on(torch.tensor([TAU, TAU]) + torch.tensor([1e-3, -1e-3]) * rank)
    found["refusal"] = _refusal(group)
    return found


def _refusal(group: Any) -> str:
    """What is said of a set whose change is not the one that its golden activations know."""
    from microedit_vllm.engine.parallel import ShardedOperator

    whole = make_operator(k=5)
    values = whole.edit_set.scoring.values.clone()
    # Row 1, which the first rank alone holds.
    values[0] += 5
    scoring = DecoderChange(whole.edit_set.scoring.indices, values)
    harmed = EditOperator.build(replace(whole.edit_set, scoring=scoring), whole.sae)
    try:
        ShardedOperator.shard(harmed, group, torch.device("cpu")).check_golden()
    except MicroEditError as error:
        return str(error)
    return ""
