"""What is compiled, and what came of it: plain data, so that it can pass between processes."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        backend, arch, warp_size: as Triton names them.
        shared_limit: shared memory that one program may have, bytes.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


@dataclass(frozen=True)
class Launch:
    """One kernel as a launch function would have it compiled.

    Attributes:
        module, name: of the jitted function.
        shapes: names of the shapes that lead to it.
        signature, constexprs, attrs: as `triton.compiler.ASTSource` takes them.
        options: of the launch: num_warps and the like.
    """

    module: str
    name: str
    shapes: tuple[str, ...]
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        """Operator and function: `topk_encode._encode`."""
        return f"{self.module.split('.')[-2]}.{self.name}"

    @property
    def constants(self) -> str:
        """The constexpr arguments: flags that are set, `NAME=value` of the others."""
        names = list(self.signature)
        words = []
        for (index,), value in self.constexprs.items():
            # A size of 1 is compiled in, too: no block size, and of no interest.
            if not names[index].isupper() or value is False:
                continue
            words.append(names[index] if value is True else f"{names[index]}={value}")
        return " ".join(words)

    @property
    def compiled_as(self) -> tuple[Any, ...]:
        """Equal for two launches that Triton compiles once."""
        parts = (self.signature, self.constexprs, self.attrs, self.options)
        return (self.module, self.name, *(repr(sorted(part.items())) for part in parts))


@dataclass(frozen=True)
class Product:
    """A `tl.dot` of a kernel: rows of its tile, and the type of its left operand (`bf16`)."""

    rows: int
    dtype: str


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: per thread; the vector registers on AMD.
        spilled: bytes per thread in memory for want of registers.
        spills_in_loops: instructions within loops that write or read those.
        scalar_spills: scalar registers kept in vector registers (AMD).
        shared: bytes per program.
        matrix: instructions by kind (`wgmma`, `mma.sync`, `tcgen05.mma`, `mfma`) in the code.
        products: what those are to do.
    """

    registers: int
    spilled: int
    spills_in_loops: int
    scalar_spills: int
    shared: int
    warps: int
    stages: int
    matrix: dict[str, int] = field(default_factory=dict)
    products: tuple[Product, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A launch compiled by one Triton for one target; `error` is one line where that failed."""

    launch: Launch
    target: str
    triton: str
    resources: Resources | None
    error: str = ""

    @property
    def label(self) -> str:
        """For a line about it."""
        launch = self.launch
        return f"{self.target}, Triton {self.triton}: {launch.kernel} [{launch.constants}]"
