"""What `microedit edit` and `microedit sae train` say and check before they begin."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from microedit_trainer.edit_settings import EditSettings
    from microedit_trainer.estimate import Machine, ModelSize, Stage
    from microedit_trainer.facts import Fact
    from microedit_trainer.sae import SaeSettings
    from microedit_vllm.artifact import SparseAutoencoder

# A run's stages are shown from this share of the free memory on.
BIG = 0.5

# Stages of a run for a model's size, with or without --offload.
StagesOf = Callable[["ModelSize", bool], Sequence["Stage"]]


def announce_edit(
    console: Console,
    model: str,
    dtype: str,
    sae: "SparseAutoencoder",
    settings: "EditSettings",
    facts: Sequence["Fact"],
) -> None:
    """Say what an edit run will take, before the model is loaded.

    Args:
        sae: in the CPU's memory.

    Raises:
        MicroEditError: more than this machine has.
    """
    from transformers import AutoTokenizer

    from microedit_trainer.estimate import Machine, ModelSize, edit_seconds, edit_stages
    from microedit_trainer.estimate.plan import plan_edit
    from microedit_trainer.language_model import resolve_folder

    folder = resolve_folder(model)
    size = ModelSize.read(folder, dtype)
    layer = settings.layer if settings.layer is not None else sae.report.get("layer")
    if not isinstance(layer, int) or not 0 <= layer < len(size.layers):
        return  # the run says what is wrong with it
    plan = plan_edit(AutoTokenizer.from_pretrained(folder), 1 << 30, sae, layer, settings, facts)
    machine = Machine.here()

    def stages_of(size: ModelSize, offload: bool) -> "Sequence[Stage]":
        return edit_stages(size, replace(plan, offload=offload), machine.device)

    present = sae.W_enc.nbytes + sae.W_dec.nbytes
    stages = _fitting(machine, stages_of, size, settings.offload, present)
    seconds = edit_seconds(
        size,
        plan,
        model_flops=machine.flops(size.dtype, size.hidden_size),
        solver_flops=machine.flops(size.dtype, size.hidden_size, plan.tokens_at_once),
        sae_flops=machine.flops(torch.float32, size.hidden_size),
    )
    _announce(console, machine, stages, seconds)


def announce_sae(
    console: Console, model: str, dtype: str, settings: "SaeSettings", offload: bool
) -> None:
    """Say what training an SAE will take, before the model is loaded.

    Raises:
        MicroEditError: more than this machine has.
    """
    from microedit_trainer.estimate import Machine, ModelSize, sae_seconds, sae_stages
    from microedit_trainer.language_model import resolve_folder

    size = ModelSize.read(resolve_folder(model), dtype)
    if not 0 <= settings.layer < len(size.layers):
        return  # the run says what is wrong with it
    machine = Machine.here()

    def stages_of(size: ModelSize, offload: bool) -> "Sequence[Stage]":
        return sae_stages(size, settings, offload, machine.device)

    stages = _fitting(machine, stages_of, size, offload, present=0)
    model_flops, product_flops = (
        machine.flops(kind, size.hidden_size) for kind in (size.dtype, torch.bfloat16)
    )
    moved = machine.bytes_per_second()
    seconds = sae_seconds(size, settings, model_flops, product_flops, moved)
    _announce(console, machine, stages, seconds)


def _fitting(
    machine: "Machine", stages_of: StagesOf, size: "ModelSize", offload: bool, present: int
) -> Sequence["Stage"]:
    """The run's stages, which fit."""
    from microedit_trainer.estimate import check_fit

    sizes, waiting = {"": size}, {"": offload}
    if size.value_bytes > 2:
        sizes["--dtype bfloat16"] = size.in_dtype(torch.bfloat16)
    if machine.device != "cpu":
        waiting["--offload"] = True
    stages = stages_of(size, offload)
    others = {
        f"{dtype} {wait}".strip(): stages_of(sizes[dtype], waiting[wait])
        for dtype in sizes
        for wait in waiting
        if (dtype or wait) and not (wait and offload)
    }
    check_fit(stages, machine, others, present)
    return stages


def _announce(
    console: Console, machine: "Machine", stages: Sequence["Stage"], seconds: dict[str, float]
) -> None:
    from microedit_trainer.estimate import gib, largest

    most = largest(stages)
    console.print(
        f"takes about {gib(most.bytes)} of {gib(machine.free)} GiB free on {machine.device} "
        f"({most.name}), and {_duration(sum(seconds.values()))}",
        highlight=False,
        soft_wrap=True,
    )
    if most.bytes < BIG * machine.free:
        return
    table = Table("stage", "GiB", "of which", "time")
    for stage in stages:
        parts = (f"{name} {gib(size)}" for name, size in stage.device.items())
        spent = seconds.get(stage.name)
        table.add_row(
            stage.name,
            gib(stage.bytes),
            ", ".join(parts),
            "" if spent is None else _duration(spent),
        )
    console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
