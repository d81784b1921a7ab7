from dataclasses import asdict, replace

import pytest
import torch

from microedit_trainer.contexts import PromptTokens
from microedit_trainer.estimate import (
    EditPlan,
    Machine,
    Stage,
    check_fit,
    edit_seconds,
    edit_stages,
    largest,
    sae_seconds,
    sae_stages,
)
from microedit_trainer.estimate.edit import PromptCounts, ridge_bytes
from microedit_trainer.sae import SaeSettings
from microedit_trainer.solvers.dense_systems import RowSystem, TokenSystem
from microedit_trainer.solvers.ridge import DENSE_BYTES
from microedit_trainer.solvers.sparse_codes import CODES_BYTES, CodedTerms, Term
from microedit_vllm.errors import MicroEditError

GIB = 1 << 30
# What a card of 24 GB (22.5 GiB on an L4 or A10) leaves beside CUDA's own.
CARD = 22 * GIB
W = 131_072 * 4096  # one matrix of LLaMA-3-8B's 32x SAE


def plan(joint: bool, facts: int, offload: bool = True) -> EditPlan:
    """ZsRE's lengths: some 15 tokens bare, 45 in chat, answers of 3."""
    prompts = 2 * facts if joint else facts
    return EditPlan(
        joint=joint,
        offload=offload,
        layer=30,
        facts=facts,
        prompts=prompts,
        tokens=facts * (15 + 45 * joint),
        longest=70,
        edited=4 * prompts,
        reworded=2 * joint,
        worded=0,
        said=0,
        mentions=2 * joint,
        swapped=min(facts, 2000) * joint,
        scored=15 * prompts,
        ordinary=3000 * joint,
        checked=2 * facts * (15 + 45 * joint),
        carries=False,
        latents=131_072,
        k=192,
        rows=max(500, 15 * facts),
        steps=30,
    )


@pytest.mark.parametrize("facts", [100, 3000])
@pytest.mark.parametrize("joint", [True, False])
def test_llama_3_8b_and_its_sae_fit_a_card_of_24_gb_by_turns(llama3_8b, joint, facts):
    assert largest(edit_stages(llama3_8b, plan(joint, facts), "cuda")).bytes < CARD
    at_once = largest(edit_stages(llama3_8b, plan(joint, facts, offload=False), "cuda"))
    assert at_once.bytes > CARD


def test_the_sequential_solver_by_hand(llama3_8b):
    stages = {s.name: s for s in edit_stages(llama3_8b, plan(joint=False, facts=1000), "cuda")}
    solving = stages["solving"].device
    assert solving["model"] == 1_486_905_344  # see `test_model_size`
    assert solving["SAE"] == 2 * W * 4 == 4 * GIB
    assert solving["copy of W_dec"] == W * 4 == 2 * GIB
    assert solving["residuals"] == 15_000 * 4096 * 2
    # All rows are touched in the end: as they are stored, and widened where they are used.
    assert stages["calibrating"].device["edit set"] == W * (2 + 2) + W * 4
    assert stages["storing residuals"].device["model"] == 2 * 8_030_261_248
    assert "SAE" not in stages["storing residuals"].device
    # The CPU keeps what waits: the layers up to 30 and the embedding, and the SAE's source.
    waiting = 2 * (31 * 218_112_000 + 128_256 * 4096)
    assert stages["solving"].host == waiting + 4 * GIB


@pytest.mark.parametrize("tokens", [30, 90])
def test_the_ridge_systems_take_no_more_than_is_said(tokens):
    d, n = 8, 64
    random = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, d, generator=random)
    mix = torch.randn(d, n, generator=random)
    terms = [Term(z, z, 1.0)]
    coded = CodedTerms.of(lambda part: (part @ mix).relu(), terms, lambda share, note: None)
    rows = len(coded.rows)
    kind = TokenSystem if tokens <= rows else RowSystem
    system = kind.of(coded, lambda share, note: None)
    held = sum(tensor.nbytes for tensor in vars(system).values())
    assert held == 8 * (rows + d) * min(tokens, rows)
    solution = system.solve(1.0)
    assert solution.nbytes == rows * d * 4
    assert ridge_bytes(tokens, rows, d) >= held + 3 * solution.nbytes


def test_the_ridge_solves_by_hand():
    """The demo's size: rows, tokens or half of the rows' and panels, whichever takes the most, and
    four of [c, d]."""
    tokens, rows, d = 1000, 4608, 576
    panels = 16 * tokens * rows + 9 * rows * d * 4
    system = max(8 * 4608 * 9792, 8 * 1000 * 7184, 4 * 4608 * 9792 + panels)
    assert ridge_bytes(tokens, rows, d) == system + 4 * rows * d * 4
    # LLaMA-3-8B's: bounded by what conjugate gradients may take.
    assert ridge_bytes(10**4, 131_072, 4096) == 3 * GIB + 4 * W * 4


def test_what_no_factor_can_hold_is_solved_in_bounded_memory():
    assert ridge_bytes(10**6, 131_072, 4096) == ridge_bytes(10**7, 131_072, 4096) > DENSE_BYTES
    assert ridge_bytes(10**6, 131_072, 4096) > CODES_BYTES


def test_training_the_sae_by_hand(llama3_8b):
    settings = SaeSettings(layer=30, width=131_072, k=192, text=(), batch=1024)
    collecting, training = sae_stages(llama3_8b, settings, offload=True, device="cuda")
    # Two matrices, each with a gradient and two moments, fp32.
    assert training.device["SAE and optimiser"] == 2 * W * 4 * 4 == 16 * GIB
    assert "model" not in training.device
    assert training.host == collecting.device["model"] == 2 * 8_030_261_248
    assert training.bytes < CARD
    _, beside = sae_stages(llama3_8b, settings, offload=False, device="cuda")
    assert beside.bytes > CARD


def test_on_a_cpu_nothing_waits(llama3_8b):
    waiting, staying = (
        edit_stages(llama3_8b, plan(True, 100, offload), "cpu") for offload in (True, False)
    )
    assert waiting == staying
    assert waiting[0].device["model"] == 2 * 8_030_261_248


def test_wordings_about_other_subjects_are_stored_and_scored_too(llama3_8b):
    own = replace(plan(True, 4000), swapped=0)
    half = plan(True, 4000)
    # Half of the facts, each in two contexts of 60 tokens together, 30 of them scored.
    assert half.held - own.held == half.run_below - own.run_below == 2000 * 60
    assert half.scored_in_all - own.scored_in_all == 2000 * 30
    stored = [edit_stages(llama3_8b, p, "cuda")[1].device["residuals"] for p in (own, half)]
    assert stored[1] - stored[0] == 2000 * 60 * 4096 * 2


def test_the_models_wordings_are_made_stored_and_scored_too(llama3_8b):
    own = replace(plan(True, 100), swapped=0)
    twice = replace(own, reworded=own.reworded + 2, worded=2, said=1000)
    # Each in two contexts of 60 tokens together, 30 of them scored, and one target each.
    assert twice.scored_in_all - own.scored_in_all == 2 * 100 * 30
    assert twice.edited_in_all - own.edited_in_all == 2 * 200
    assert twice.held - own.held == 2 * 100 * 60 + 2 * 200
    seconds = [edit_seconds(llama3_8b, p, 1e13, 1e12, 1e13) for p in (own, twice)]
    assert "wording" not in seconds[0]
    assert seconds[1]["wording"] == pytest.approx(2 * 32 * 218_112_000 * 1000 / 1e13)
    assert seconds[1]["storing residuals"] > 1.5 * seconds[0]["storing residuals"]


def test_time_grows_with_what_is_done(llama3_8b):
    few, many = (edit_seconds(llama3_8b, plan(False, n), 1e13, 1e12, 1e13) for n in (100, 1000))
    # By hand: 100 facts of 15 tokens, twice the parameters a token.
    below = 2 * 31 * 218_112_000 * 100 * 15
    assert few["storing residuals"] == pytest.approx(below / 1e13)
    assert sum(many.values()) == pytest.approx(10 * sum(few.values()), rel=0.05)
    settings = SaeSettings(layer=30, width=131_072, k=192, text=(), steps=1000, tokens=10**6)
    slow, fast = (sae_seconds(llama3_8b, settings, 1e13, 1e13, rate) for rate in (1e11, 1e12))
    assert slow["training"] > fast["training"] > 1000 * 2 * W * 1024 / 1e13


STAGES = [Stage("storing", {"model": 10 * GIB}), Stage("solving", {"model": 20 * GIB}, 5 * GIB)]
SMALLER = [Stage("solving", {"model": 8 * GIB})]


def machine(free: float, host: float = 64, device: str = "cuda") -> Machine:
    return Machine(device, int(free * GIB), int(host * GIB))


def test_what_fits_passes():
    check_fit(STAGES, machine(22), {})


def test_what_does_not_fit_is_refused_with_what_would():
    message = r"needs about 21\.0 GiB of memory on cuda \(solving\), and 16\.0 GiB are free; "
    with pytest.raises(MicroEditError, match=message + r"with --offload it needs 8\.4 GiB"):
        check_fit(STAGES, machine(16), {"--dtype bfloat16": STAGES, "--offload": SMALLER})
    with pytest.raises(MicroEditError, match=r"even with --offload it needs 8\.4 GiB: free"):
        check_fit(STAGES, machine(4), {"--offload": SMALLER})
    with pytest.raises(MicroEditError, match="take a smaller SAE, or a larger machine"):
        check_fit(STAGES, machine(4), {})


def test_the_cpu_s_memory_counts_too():
    with pytest.raises(MicroEditError, match=r"5\.2 GiB of the CPU's memory beside the GPU's"):
        check_fit(STAGES, machine(22, host=4), {})
    check_fit(STAGES, machine(22, host=4), {}, present=2 * GIB)


def test_what_is_loaded_already_is_not_counted_twice():
    cpu = machine(20, host=20, device="cpu")
    with pytest.raises(MicroEditError, match="on cpu"):
        check_fit(STAGES, cpu, {})
    check_fit(STAGES, cpu, {}, present=2 * GIB)


def test_this_machine_is_measured():
    here = Machine.here()
    assert here.free > 0
    assert 1e6 < here.flops(torch.float32, 32) < 1e15
    assert 1e6 < here.bytes_per_second() < 1e14


def test_the_rows_of_the_sequential_solver_are_bounded_by_the_sae(llama3_8b):
    small = replace(plan(joint=False, facts=1), tokens=10)
    assert small.changed_rows() == 1920
    assert plan(joint=False, facts=1000).changed_rows() == 131_072


def test_tokens_of_a_part_of_the_prompts_are_counted_for_all():
    named = PromptTokens((0,) * 10, (1, 2), 3, (1, 9), subject_start=4, subject_stop=6)
    nameless = PromptTokens((0,) * 6, (1,), 3, (1, 5))
    found = PromptCounts.of([named, nameless], share=0.5)
    expected = {"prompts": 4, "tokens": 38, "longest": 12, "edited": 10}
    assert asdict(found) == {**expected, "scored": 24, "identifying": 18}
