"""Compile a launch for a GPU that is not there, and read what it takes from the assembly.

Imports Triton: in a process of its own, made by `pool.py`.
"""

import importlib
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_resources.results import (
    TARGETS,
    Launch,
    Outcome,
    Product,
    Resources,
    Target,
)
from benchmarks.kernel_resources.spills import AMDGCN, SASS, spills_in_loops

# They come with Triton. A compiled kernel tells its registers only where there is a driver.
_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"

_PRODUCT = re.compile(r"\btt\.dot\w* .*? : tensor<(\d+)x\d+x(\w+)> \*")
_MATRIX = {
    "wgmma": re.compile(r"\bwgmma\.mma_async"),
    "tcgen05.mma": re.compile(r"\btcgen05\.mma\b"),
    "mma.sync": re.compile(r"\bmma\.sync"),
    "mfma": re.compile(r"\bv_mfma_"),
}


def _tool(name: str, *words: str) -> str:
    command = [str(_TOOLS / name), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
        # Without a stack nothing is spilled.
        looped = spills_in_loops(_tool("nvdisasm", "-c", file.name), SASS) if int(stack) else 0
    return {
        "registers": int(registers),
        "spilled": int(stack),
        "spills_in_loops": looped,
        "scalar_spills": 0,
    }


def _amd(assembly: str) -> dict[str, int]:
    def metadata(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)[1])  # type: ignore[index]

    return {
        "registers": metadata("vgpr_count"),
        "spilled": metadata("private_segment_fixed_size"),
        "spills_in_loops": spills_in_loops(assembly, AMDGCN),
        "scalar_spills": metadata("sgpr_spill_count"),
    }


def _compile(launch: Launch, target: Target) -> Resources:
    fn = getattr(importlib.import_module(launch.module), launch.name)
    source = ASTSource(fn, launch.signature, launch.constexprs, launch.attrs)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    kernel = triton.compile(source, target=gpu, options=launch.options)
    amd = target.backend == "hip"
    assembly = kernel.asm["amdgcn" if amd else "ptx"]
    counts = {name: len(pattern.findall(assembly)) for name, pattern in _MATRIX.items()}
    return Resources(
        **(_amd(assembly) if amd else _nvidia(kernel.asm["cubin"])),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        matrix={name: count for name, count in counts.items() if count},
        products=tuple(
            Product(int(rows), dtype) for rows, dtype in _PRODUCT.findall(kernel.asm["ttir"])
        ),
    )


def compile_launch(launch: Launch, target: str) -> Outcome:
    """Compile it. A failure of the compiler is an outcome, too."""
    try:
        resources = _compile(launch, TARGETS[target])
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "no reason given"
        line = f"{type(error).__name__}: {reason}"
        return Outcome(launch, target, triton.__version__, None, line)
    return Outcome(launch, target, triton.__version__, resources)
