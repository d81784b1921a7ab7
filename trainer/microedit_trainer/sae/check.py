"""Does an SAE suit editing? Its quality on a model's real activations, against guides."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microedit_trainer.activations import Activations, collect_activations
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae.report import Reconstruction, measure
from microedit_trainer.text_sources import read_texts
from microedit_trainer.token_sequences import build_sequences
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.errors import MicroEditError

# Guides, from SAEs of the demo's model: those with an FVU of 0.07 to 0.30 served well, one with
# 0.43 told edited prompts from others clearly worse.
GOOD_FVU = 0.30
BAD_FVU = 0.43
MOST_DEAD = 0.5
"""Facts live on the rows that are active: half a width that never is carries half the facts."""
_USES_TO_JUDGE_DEAD = 100
"""Active latents in all tokens, per latent, below which many a living latent is not seen."""

SUITS, DOUBTFUL, UNSUITABLE = "suits editing", "doubtful", "does not suit editing"

_CHARACTERS_PER_TOKEN = 20
_SEQUENCE_LENGTH = 128


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        sources: per text source, as `Reconstruction` measures it.
        whole: over all tokens; sinks are left out, as in training.
        median_norm: ‖z‖ in the median, sinks included.
        verdict: SUITS, DOUBTFUL or UNSUITABLE; reasons: why, one line each.
    """

    layer: int
    k: int
    num_latents: int
    sources: dict[str, Reconstruction]
    whole: Reconstruction
    median_norm: float
    verdict: str
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For a program; FVU is null where it is not a number."""
        return {
            "layer": self.layer,
            "k": self.k,
            "num_latents": self.num_latents,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "median_norm": self.median_norm,
            "all": _figures(self.whole),
            "sources": {name: _figures(found) for name, found in self.sources.items()},
        }


def check_sae(
    model: LanguageModel,
    sae: SparseAutoencoder,
    text: tuple[str, ...],
    layer: int | None = None,
    tokens: int = 20_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Check:
    """Measure the SAE on text, which should be none that it was trained on.

    Args:
        text: sources (see `text_sources`).
        layer: None takes the one that the SAE's folder names.
        progress: called with the activations collected and their total.

    Raises:
        MicroEditError: no layer, another width than the model's, or no usable text.
    """
    chosen = layer if layer is not None else sae.report.get("layer")
    if not isinstance(chosen, int):
        raise MicroEditError("the SAE folder does not say which layer it belongs to; add --layer")
    model.check_layer(chosen)
    if sae.d_in != model.hidden_size:
        raise MicroEditError(
            f"the SAE is for residuals of width {sae.d_in}, {model.name} has "
            f"{model.hidden_size}; name the model that it was trained on"
        )
    sae = sae.to(model.device)
    with tempfile.TemporaryDirectory() as folder:
        found = _collect(model, chosen, text, tokens, seed, Path(folder) / "z", progress)
        sources = {}
        for number, name in enumerate(found.names):
            rows = found.rows[found.is_ordinary & (found.source == number)]
            if len(rows):
                sources[name] = measure(sae, rows)
        whole = measure(sae, found.rows[found.is_ordinary])
    verdict, reasons = judge(sae.k, whole, sources)
    return Check(
        layer=chosen,
        k=sae.k,
        num_latents=sae.num_latents,
        sources=sources,
        whole=whole,
        median_norm=found.median_norm,
        verdict=verdict,
        reasons=reasons,
    )


def judge(
    k: int, whole: Reconstruction, sources: dict[str, Reconstruction]
) -> tuple[str, tuple[str, ...]]:
    """The verdict by the guides above, and its reasons."""
    if not math.isfinite(whole.fvu) or whole.fvu > BAD_FVU:
        reason = f"FVU {whole.fvu:.2f} is above {BAD_FVU}: edited prompts look like others"
        return UNSUITABLE, (reason,)
    doubts = [
        f"FVU {found.fvu:.2f} on {name} is above {GOOD_FVU}"
        for name, found in sources.items()
        if len(sources) > 1 and not found.fvu <= GOOD_FVU
    ]
    if whole.fvu > GOOD_FVU:
        doubts.insert(0, f"FVU {whole.fvu:.2f} is above {GOOD_FVU}")
    uses = whole.tokens * whole.l0 / len(whole.active)
    if whole.dead_share > MOST_DEAD and uses >= _USES_TO_JUDGE_DEAD:
        doubts.append(f"{whole.dead_share:.0%} of the latents are never active: room for few facts")
    if doubts:
        return DOUBTFUL, tuple(doubts)
    reasons = [f"FVU {whole.fvu:.2f} is at most {GOOD_FVU}"]
    if whole.l0 < k / 2:
        reasons.append(f"only {whole.l0:.0f} of k = {k} latents are active: a smaller k will do")
    if uses < _USES_TO_JUDGE_DEAD:
        reasons.append("too few tokens to judge unused latents; raise --tokens")
    return SUITS, tuple(reasons)


def _collect(
    model: LanguageModel,
    layer: int,
    text: tuple[str, ...],
    tokens: int,
    seed: int,
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> Activations:
    if not text or tokens < 1:
        raise MicroEditError("no text to check on; pass --text, and at least one of --tokens")
    limit = _CHARACTERS_PER_TOKEN * tokens
    texts = [read_texts(spec, model.tokenizer, seed, limit) for spec in dict.fromkeys(text)]
    length = min(_SEQUENCE_LENGTH, model.max_length)
    sequences = build_sequences(texts, model.tokenizer, tokens, length, 0.0, seed)
    if not int(sequences.used.sum()):
        raise MicroEditError("the text is too short to check on; add --text")
    return collect_activations(model, layer, sequences, path, progress)


def _figures(found: Reconstruction) -> dict[str, float | int | None]:
    return {
        "tokens": found.tokens,
        "fvu": found.fvu if math.isfinite(found.fvu) else None,
        "l0": found.l0,
        "dead_share": found.dead_share,
        "mean_distance": found.mean_distance,
    }
