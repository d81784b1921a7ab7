"""Launches as the shipped functions make them, recorded instead of run.

The functions get tensors without memory and Triton's own specialisation sees the arguments, so
that what is compiled is what would run: nothing is written down a second time. Imports Triton: in
a process of its own, made by `pool.py`.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import microedit_kernels
from benchmarks.kernel_resources.results import TARGETS, Launch, Target


def _specialised(fn: JITFunction, backend: Any, args: Any, kwargs: Any, shape: str) -> Launch:
    """Follows `JITFunction.run` up to the point where it compiles (3.6, 3.9)."""
    # The default will change with Triton 3.10.
    kwargs = {"enable_fp_fusion": True, **kwargs}
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    _, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
    return Launch(fn.__module__, fn.__name__, (shape,), signature, constexprs, attrs, options)


@contextmanager
def _recorded(target: Target, shape: str) -> Iterator[list[Launch]]:
    backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    launches: list[Launch] = []

    def run(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialised(fn, backend, args, kwargs, shape))

    # What launch functions ask to tell AMD from NVIDIA.
    hip = "0" if target.backend == "hip" else None
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(torch.version, "hip", hip):
        yield launches


def _largest_batches(launches: Iterable[Launch]) -> list[Launch]:
    """One per kernel and choice of blocks: the last, where only sizes at run time differ."""
    found = {}
    for launch in launches:
        types = repr(sorted((n, t) for n, t in launch.signature.items() if t.startswith("*")))
        found[launch.kernel, launch.constants, types, repr(launch.options)] = launch
    return list(found.values())


def launches_for(target: str, cases: Iterable[tuple[str, Callable[[], object]]]) -> list[Launch]:
    """What the cases launch on that target, each kernel that differs once.

    Args:
        cases: name of a shape, and what launches kernels at it; batches in ascending order.
    """
    by_shape: dict[str, list[Launch]] = {}
    for shape, call in cases:
        with _recorded(TARGETS[target], shape) as launches:
            call()
        by_shape.setdefault(shape, []).extend(launches)
    found: dict[tuple[Any, ...], Launch] = {}
    for launches in by_shape.values():
        for launch in _largest_batches(launches):
            known = found.get(launch.compiled_as)
            shapes = (*known.shapes, *launch.shapes) if known else launch.shapes
            found[launch.compiled_as] = replace(launch, shapes=shapes)
    return sorted(found.values(), key=lambda launch: launch.kernel)


def _called_names(source: str) -> tuple[set[str], set[str]]:
    """Names that a module launches, `name[grid](…)`, and those that it calls."""
    launched: set[str] = set()
    called: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        at_grid = isinstance(node.func, ast.Subscript)
        name = ast.unparse(node.func.value if isinstance(node.func, ast.Subscript) else node.func)
        (launched if at_grid else called).add(name.rpartition(".")[2])
    return launched, called


def shipped_kernels() -> set[str]:
    """Every jitted function of the package but those that only others call."""
    jitted: dict[str, str] = {}
    launched: set[str] = set()
    called: set[str] = set()
    for found in pkgutil.walk_packages(microedit_kernels.__path__, "microedit_kernels."):
        module = importlib.import_module(found.name)
        for names, more in zip(
            (launched, called), _called_names(inspect.getsource(module)), strict=True
        ):
            names |= more
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.__module__ == found.name:
                jitted[f"{found.name.split('.')[-2]}.{name}"] = name
    return {kernel for kernel, name in jitted.items() if name in launched or name not in called}


def without_case(launches: Iterable[Launch]) -> list[str]:
    """Shipped kernels that no case launches."""
    return sorted(shipped_kernels() - {launch.kernel for launch in launches})
