from dataclasses import replace
from pathlib import Path

import pytest
import torch

from microedit_trainer.sae.check import DOUBTFUL, SUITS, UNSUITABLE, check_sae, judge
from microedit_trainer.sae.report import Reconstruction, measure
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_sae
from tests.trainer.tiny_edits import LAYER


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "text.txt"
    path.write_text(
        "".join(f"In {year} the river stood {year % 7} feet high. " for year in range(300))
    )
    return str(path)


@pytest.fixture(scope="module")
def found(lm, sae, text):
    return check_sae(lm, sae, (text,), tokens=2000)


def test_the_figures_are_those_of_the_models_own_activations(lm, sae, found, text):
    """Again in plain torch: transformers' hidden states, dense codes, fp64."""
    ids = lm.tokenizer(Path(text).read_text()).input_ids
    pieces = [torch.tensor([ids[start : start + 128]]) for start in range(0, 2000, 128)]
    outputs = [lm.model(input_ids=piece, output_hidden_states=True) for piece in pieces]
    z = torch.cat([output.hidden_states[LAYER + 1][0, 8:] for output in outputs]).double()
    pre = (z - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    kth = pre.topk(sae.k).values[:, -1:]
    h = torch.where(pre >= kth, pre.clamp(min=0), 0.0)
    rebuilt = h @ sae.W_dec.double() + sae.b_dec.double()
    fvu = (rebuilt - z).square().sum() / (z - z.mean(0)).square().sum()
    assert found.layer == LAYER
    assert found.whole.fvu == pytest.approx(float(fvu), rel=0.15)  # not the very same tokens
    assert found.whole.l0 == pytest.approx(float((h > 0).sum(1).double().mean()), rel=0.1)
    assert found.median_norm == pytest.approx(float(z.norm(dim=1).median()), rel=0.1)
    assert 1500 < found.whole.tokens < 2500


def test_another_layer_is_seen_at_once(lm, sae, found, text):
    other = check_sae(lm, sae, (text,), layer=LAYER - 1, tokens=2000)
    assert other.whole.fvu > 2 * found.whole.fvu


def test_l0_counts_active_latents_and_not_k():
    sae = tiny_sae(k=40)
    z = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    active = ((z - sae.b_dec) @ sae.W_enc.T + sae.b_enc > 0).sum(1).clamp(max=40)
    assert measure(sae, z).l0 == pytest.approx(float(active.float().mean()))
    assert float(active.float().mean()) < 40


def quality(fvu=0.2, l0=8.0, live=100, n=100, tokens=100_000):
    return Reconstruction(tokens, fvu, 1.0, torch.arange(n) < live, l0)


@pytest.mark.parametrize(
    ("whole", "sources", "verdict", "reason"),
    [
        ({}, {}, SUITS, "FVU 0.20 is at most 0.3"),
        ({"fvu": 0.35}, {}, DOUBTFUL, "FVU 0.35 is above 0.3"),
        ({"fvu": 0.44}, {}, UNSUITABLE, "FVU 0.44 is above 0.43"),
        ({"fvu": float("nan")}, {}, UNSUITABLE, "FVU nan"),
        ({}, {"chat": {"fvu": 0.4}, "prose": {}}, DOUBTFUL, "FVU 0.40 on chat"),
        ({"live": 40}, {}, DOUBTFUL, "60% of the latents are never active"),
        ({"live": 40, "tokens": 1000}, {}, SUITS, "too few tokens to judge unused latents"),
        ({"l0": 3.0}, {}, SUITS, "only 3 of k = 8"),
    ],
)
def test_verdicts(whole, sources, verdict, reason):
    parts = {name: quality(**changes) for name, changes in sources.items()}
    found, reasons = judge(8, quality(**whole), parts)
    assert found == verdict
    assert any(reason in r for r in reasons)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ()}, "pass --text"),
        ({"tokens": 0}, "--tokens"),
        ({"layer": 9}, "layer 9 does not exist"),
        ({"sae": tiny_sae()}, "does not say which layer"),
        ({"sae": tiny_sae(), "layer": 1}, "width 12, .* has 32"),
    ],
)
def test_what_cannot_be_checked_is_one_line(lm, sae, text, changes, message):
    with pytest.raises(MicroEditError, match=message):
        check_sae(lm, **({"sae": sae, "text": (text,)} | changes))


def test_text_of_a_word_is_too_short(lm, sae, tmp_path):
    (tmp_path / "text.txt").write_text("ab")
    with pytest.raises(MicroEditError, match="too short"):
        check_sae(lm, sae, (str(tmp_path / "text.txt"),))


def test_a_dead_sae_does_not_suit(lm, sae, text):
    dead = replace(sae, b_enc=sae.b_enc - 1e6)
    found = check_sae(lm, dead, (text,), tokens=1000)
    assert found.verdict == UNSUITABLE
    assert (found.whole.l0, found.whole.dead_share) == (0, 1)
