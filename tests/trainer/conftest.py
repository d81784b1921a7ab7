"""A tiny model with an SAE trained on its ordinary prompts: once per session, in two seconds."""

from contextlib import chdir

import pytest

from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae import SaeSettings
from microedit_trainer.sae.train import train_sae
from microedit_vllm.artifact import SparseAutoencoder
from tests.tiny_model import tiny_model
from tests.trainer.tiny_edits import LAYER


@pytest.fixture(scope="session")
def lm(tmp_path_factory) -> LanguageModel:
    return LanguageModel.load(str(tiny_model(tmp_path_factory.mktemp("edited") / "model")))


@pytest.fixture(scope="session")
def sae_folder(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    (folder / "text.txt").write_text("\n".join(ordinary_lines()))
    settings = SaeSettings(
        layer=LAYER, width=512, k=8, text=("text.txt",), tokens=9000, steps=200, batch=256
    )
    # By a relative name: a source's name is part of what its text is shuffled by.
    with chdir(folder):
        train_sae(lm, settings, folder / "sae")
    return folder / "sae"


@pytest.fixture(scope="session")
def sae(sae_folder) -> SparseAutoencoder:
    return SparseAutoencoder.load(sae_folder)
