"""The gate on what kernels take: planted faults, and the real kernels for sm_90.

Kernels are imported for Triton's interpreter in this process, so the real ones compile in others.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import kernels_aot
from benchmarks.kernel_resources import pool, report
from benchmarks.kernel_resources.cases import BATCHES
from benchmarks.kernel_resources.gate import breaches
from benchmarks.kernel_resources.results import TARGETS, Launch, Outcome, Product, Resources
from benchmarks.kernel_resources.spills import AMDGCN, SASS, spills_in_loops
from microedit_kernels import launch_table
from microedit_kernels.topk_encode import launch as encode_launch
from microedit_vllm.errors import MicroEditError

ROOT = Path(__file__).parents[2]
LAUNCH = Launch(
    "microedit_kernels.topk_encode.kernel",
    "_encode",
    ("odd",),
    {
        "z": "*bf16",
        "rows": "constexpr",
        "RELU": "constexpr",
        "NORM": "constexpr",
        "BM": "constexpr",
    },
    {(1,): 1, (2,): True, (3,): False, (4,): 64},
    {},
    {"num_warps": 4},
)
GOOD = Resources(
    registers=120,
    spilled=32,
    spills_in_loops=0,
    scalar_spills=4,
    shared=64 * 1024,
    warps=4,
    stages=3,
    matrix={"wgmma": 4},
    products=(Product(64, "bf16"),),
)


def outcome(target="sm_90", **changes):
    return Outcome(LAUNCH, target, "3.9.0", replace(GOOD, **changes))


def test_nothing_is_said_of_a_good_kernel():
    assert breaches([outcome()]) == []


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"spills_in_loops": 3}, "3 spill instructions in loops"),
        ({"shared": 228 * 1024}, "228 KiB of shared memory, sm_90 has 227"),
        ({"target": "gfx942", "matrix": {"mfma": 1}, "shared": 65 * 1024}, "gfx942 has 64"),
        ({"matrix": {"mma.sync": 64}}, "no wgmma for a product of 64 rows of bf16"),
        ({"matrix": {}, "products": (Product(16, "f16"),)}, "no mma.sync for a product of 16"),
        ({"target": "sm_100"}, "no tcgen05.mma"),
        ({"target": "sm_80"}, "no mma.sync"),
        ({"target": "gfx942"}, "no mfma"),
        ({"products": (Product(128, "f8E4M3FN"),), "matrix": {}}, "no wgmma"),
    ],
)
def test_a_planted_fault_is_named(fault, line):
    (found,) = breaches([outcome(), outcome(**fault)])
    assert "Triton 3.9.0: topk_encode._encode [RELU BM=64]: " in found
    assert line in found


def test_a_kernel_that_does_not_compile_is_a_breach():
    (line,) = breaches([Outcome(LAUNCH, "sm_90", "3.6.0", None, "PTXASError: no")])
    assert line.endswith("does not compile: PTXASError: no")


def test_fp32_has_no_instruction_that_is_due():
    assert breaches([outcome(matrix={}, products=(Product(64, "f32"),))]) == []


IN_LOOP = """
        /*0010*/                   STL [R1], R2 ;
.L_x_0:
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   LDL R2, [R1] ;
.L_x_1:
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""
# Out of line, and back: no loop, though the jump goes up.
OUT_OF_LINE = """
        /*0010*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDL R2, [R1] ;
        /*0030*/                   EXIT ;
.L_x_1:
        /*0040*/                   STL [R1], R2 ;
        /*0050*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""
AMD_LOOP = """
	scratch_store_dword off, v1, s0 ; 4-byte Folded Spill
.LBB0_1:
	scratch_load_dword v1, off, s0 ; 4-byte Folded Reload
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


@pytest.mark.parametrize(
    ("assembly", "syntax", "count"),
    [(IN_LOOP, SASS, 1), (OUT_OF_LINE, SASS, 0), (AMD_LOOP, AMDGCN, 1), ("", SASS, 0)],
)
def test_spills_count_within_loops_alone(assembly, syntax, count):
    assert spills_in_loops(assembly, syntax) == count


def test_tables_hold_every_kernel_and_the_most_of_each_run():
    outcomes = [outcome(), outcome(registers=200), outcome("gfx942", matrix={"mfma": 2})]
    assert [len(table.rows) for table in report.tables(outcomes)] == [2, 1]
    assert "| 4 wgmma |" in report.resource_table(outcomes[:1])
    summary = report.summary_table(outcomes).splitlines()
    assert summary[2].startswith("| sm_90 | 3.9.0 | 2 | 200 | 32 | 0 | 64.0 | 227 |")
    assert report.as_json(outcomes)[0]["compiled_in"] == "RELU BM=64"


def test_a_block_of_the_document_is_replaced():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert report.with_block(text, "x", r"\1") == "a\n<!-- x -->\n\\1\n<!-- /x -->\nb"
    with pytest.raises(MicroEditError, match="no <!-- y -->"):
        report.with_block(text, "y", "")


def test_batches_reach_every_row_of_the_launch_tables(monkeypatch):
    for operator in ("topk_encode", "sparse_decode", "edit_change"):
        reached = {json.dumps(launch_table.settings(operator, rows)) for rows in BATCHES}
        assert reached == {json.dumps(line) for _, line in launch_table.table()[operator]}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert {encode_launch.encode_config(rows, False).stages for rows in BATCHES} == {2}


def in_another_process(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_shipped_kernels_are_good_on_sm_90_and_the_document_says_what_they_take():
    run = in_another_process("benchmarks/kernels_aot.py", "--targets", "sm_90", "--check-docs")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "none out of bounds" in run.stdout


def test_a_kernel_without_a_case_is_named():
    run = in_another_process(
        "-c",
        "from benchmarks.kernel_resources.cases import cases\n"
        "from benchmarks.kernel_resources.recording import launches_for, without_case\n"
        "kept = [case for case in cases('sm_90') if case[1].func.__name__ != '_merge']\n"
        "print(without_case(launches_for('sm_90', cases('sm_90'))))\n"
        "print(without_case(launches_for('sm_90', kept)))",
    )
    assert run.stdout.splitlines() == ["[]", "['topk_encode._merge']"], run.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--targets", "sm_70"], "no target 'sm_70': choose from sm_80"),
        (["--also-triton", "nowhere"], "no Triton is in nowhere: run make kernels-aot"),
        (["--targets", "sm_80", "--check-docs"], "needs the target sm_90"),
        (["--write-docs"], "--write-docs needs every target and --also-triton"),
    ],
)
def test_bad_input_gets_one_line(words, line):
    app = kernels_aot.typer.Typer()
    app.command()(kernels_aot.main)
    with pytest.raises(MicroEditError, match=line.replace("(", r"\(")):
        app(words, standalone_mode=False)


def test_another_triton_is_known_by_its_folder(tmp_path):
    metadata = tmp_path / "triton-3.6.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.6.0\n")
    assert pool.triton_in(tmp_path).version == "3.6.0"
    assert list(TARGETS) == ["sm_80", "sm_90", "sm_100", "gfx942"]
