"""What a shipped kernel must not do."""

from collections.abc import Iterable

from benchmarks.kernel_resources.results import TARGETS, Outcome, Product, Resources, Target

# wgmma (and tcgen05) work on 64 rows and more; fewer fall to mma.sync.
WARP_GROUP_ROWS = 64


def matrix_instruction(target: Target, product: Product) -> str | None:
    """The instruction that is due for a product; None where its type has none (fp32)."""
    if not product.dtype.startswith(("bf16", "f16", "f8")):
        return None
    if target.backend == "hip":
        return "mfma"
    if product.rows >= WARP_GROUP_ROWS and target.name in ("sm_90", "sm_100"):
        return "wgmma" if target.name == "sm_90" else "tcgen05.mma"
    return "mma.sync"


def _faults(resources: Resources, target: Target) -> Iterable[str]:
    if resources.spills_in_loops:
        yield (
            f"{resources.spills_in_loops} spill instructions in loops "
            f"({resources.spilled} bytes per thread, {resources.registers} registers)"
        )
    if resources.shared > target.shared_limit:
        yield (
            f"{resources.shared / 1024:g} KiB of shared memory, "
            f"{target.name} has {target.shared_limit // 1024}"
        )
    for product in resources.products:
        due = matrix_instruction(target, product)
        if due and not resources.matrix.get(due):
            yield f"no {due} for a product of {product.rows} rows of {product.dtype}"


def breaches(outcomes: Iterable[Outcome]) -> list[str]:
    """A line for everything that is wrong; none if all is well."""
    lines = []
    for outcome in outcomes:
        if outcome.resources is None:
            lines.append(f"{outcome.label}: does not compile: {outcome.error}")
            continue
        faults = _faults(outcome.resources, TARGETS[outcome.target])
        lines += [f"{outcome.label}: {fault}" for fault in faults]
    return lines
