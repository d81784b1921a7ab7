"""Memory of a run by stage, and whether the machine has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from microedit_trainer.estimate.machine import Machine
from microedit_vllm.errors import MicroEditError

# What allocators lose between the pieces.
SLACK = 1.05
GIB = 1 << 30


@dataclass(frozen=True)
class Stage:
    """A part of a run and what is in memory then, in bytes.

    Attributes:
        device: by what it is. host: what lies in the CPU's memory beside it.
    """

    name: str
    device: dict[str, int]
    host: int = 0

    @property
    def bytes(self) -> int:
        return int(SLACK * sum(self.device.values()))


def largest(stages: Sequence[Stage]) -> Stage:
    """The stage that takes the most of the device."""
    return max(stages, key=lambda stage: stage.bytes)


def check_fit(
    stages: Sequence[Stage],
    machine: Machine,
    others: Mapping[str, Sequence[Stage]],
    present: int = 0,
) -> None:
    """Refuse a run that this machine cannot hold.

    Args:
        others: the stages under other options, by how these are written.
        present: bytes of the stages that are in the CPU's memory already.

    Raises:
        MicroEditError: it does not fit; says what would.
    """
    most = largest(stages)
    loaded = present if machine.device == "cpu" else 0
    if most.bytes > machine.free + loaded:
        raise MicroEditError(
            f"this run needs about {gib(most.bytes)} GiB of memory on {machine.device} "
            f"({most.name}), and {gib(machine.free + loaded)} GiB are free; "
            + _what_fits(machine.free + loaded, others)
        )
    host = max(stage.host for stage in stages)
    if machine.device != "cpu" and SLACK * host > machine.free_host + present:
        raise MicroEditError(
            f"this run needs about {gib(SLACK * host)} GiB of the CPU's memory beside the GPU's, "
            f"and {gib(machine.free_host + present)} GiB are free; free some, or run it elsewhere"
        )


def _what_fits(free: int, others: Mapping[str, Sequence[Stage]]) -> str:
    needs = {options: largest(stages).bytes for options, stages in others.items()}
    fits = [options for options, need in needs.items() if need <= free]
    if fits:
        return f"with {fits[0]} it needs {gib(needs[fits[0]])} GiB"
    if needs:
        least = min(needs, key=needs.__getitem__)
        return (
            f"even with {least} it needs {gib(needs[least])} GiB: free memory, take a smaller "
            "SAE, or a larger machine"
        )
    return "free memory, take a smaller SAE, or a larger machine"


def gib(count: float) -> str:
    """Bytes in GiB, as they are shown."""
    return f"{count / GIB:.1f}"
