"""What tests of all three roots share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's model folder, written once per machine into the user's cache."""
    from microedit_trainer.demo.smollm2 import prepare_smollm2

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return prepare_smollm2(cache / "microedit" / "smollm2")
