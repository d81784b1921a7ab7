import pytest

from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.cli.main import main
from tests.tiny_model import tiny_model


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["sae", "train", *arguments])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


@pytest.fixture
def options(tmp_path):
    (tmp_path / "prose.txt").write_text(
        "".join(f"{n} birds and {n * n} stones, " for n in range(400))
    )
    chosen = {
        "--model": tiny_model(tmp_path / "model"),
        "--layer": 1,
        "--width": 64,
        "--k": 4,
        "--text": tmp_path / "prose.txt",
        "--tokens": 3000,
        "--steps": 20,
        "--out": tmp_path / "sae",
    }
    return {name: str(value) for name, value in chosen.items()}


def test_the_command_writes_a_folder_and_prints_its_quality(options, capsys, tmp_path):
    status, out, _ = run(capsys, *[word for pair in options.items() for word in pair])
    assert status == 0
    assert "prose.txt" in out
    assert "FVU" in out
    assert SparseAutoencoder.load(tmp_path / "sae").num_latents == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--k": "65"}, "width 64 is smaller than k = 65"),
        ({"--layer": "7"}, "layer 7 does not exist"),
        ({"--text": "package:no-such-package"}, "'no-such-package' is not installed"),
        ({"--model": "./nowhere"}, "./nowhere is not a model folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options, capsys, changes, message):
    words = [word for pair in (options | changes).items() for word in pair]
    status, out, err = run(capsys, *words)
    assert status == 2
    assert out == ""
    assert err.count("microedit: ") == 1
    assert message in err
