import json
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path):
    """Write a facts file from records or text."""

    def write(*parts, encoding="utf-8", name="facts.jsonl") -> Path:
        lines = [part if isinstance(part, str) else json.dumps(part) for part in parts]
        path = tmp_path / name
        path.write_bytes("\n".join(lines).encode(encoding))
        return path

    return write
