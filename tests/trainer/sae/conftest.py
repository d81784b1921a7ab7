"""A tiny model and texts that a small SAE can learn."""

import random
from pathlib import Path

import pytest

from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae import SaeSettings
from tests.tiny_model import tiny_model

WORDS = ("bird", "stone", "river", "cloud", "seven", "green", "walks", "sings", "under", "old")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> LanguageModel:
    return LanguageModel.load(str(tiny_model(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="session")
def prose(tmp_path_factory) -> Path:
    """A text file of about 20,000 bytes, made of few words."""
    words = random.Random(0)
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(" ".join(words.choice(WORDS) for _ in range(3600)))
    return path


@pytest.fixture
def settings(prose) -> SaeSettings:
    return SaeSettings(
        layer=1,
        width=128,
        k=8,
        text=(str(prose),),
        tokens=8000,
        steps=120,
        batch=256,
        sample_tokens=1500,
        checkpoint_every=50,
    )
