import pytest
import torch

from microedit_trainer.activations import SINK_FACTOR, collect_activations
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.text_sources import Text
from microedit_trainer.token_sequences import TokenSequences, build_sequences
from tests.tiny_model import tiny_model

LAYER = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LanguageModel.load(str(tiny_model(tmp_path_factory.mktemp("tiny"))))


def some_sequences(model: LanguageModel) -> TokenSequences:
    texts = [Text("prose", n, f"{n} sentences about {n * n} birds " * 3) for n in range(60)]
    return build_sequences([texts], model.tokenizer, 4000, 48, 0.1, seed=0)


def test_rows_are_the_models_own_residuals(model, tmp_path):
    sequences = some_sequences(model)
    found = collect_activations(model, LAYER, sequences, tmp_path / "rows")
    assert found.rows.shape == (int(sequences.used.sum()), model.hidden_size)
    shortest = int(sequences.lengths.argmin())
    ids = torch.tensor([sequences.split()[shortest]])
    start = int(sequences.starts[shortest])
    alone = model.lower(ids, LAYER)[0, start:].bfloat16()
    torch.testing.assert_close(found.rows[: len(alone)], alone, rtol=0.01, atol=0.01)


def test_held_out_rows_are_those_of_held_out_sequences(model, tmp_path):
    sequences = some_sequences(model)
    found = collect_activations(model, LAYER, sequences, tmp_path / "rows")
    assert int(found.is_held_out.sum()) == int(sequences.used[sequences.held_out].sum()) > 0
    assert not set(found.train.tolist()) & set(found.held_out("prose").tolist())


def test_sinks_are_left_out(model, tmp_path, monkeypatch):
    """One row in fifty is made an outlier: neither trained on nor measured on."""
    lower = LanguageModel.lower

    def with_sinks(self, ids, layer):
        z = lower(self, ids, layer)
        z[ids == self.tokenizer("b").input_ids[0]] *= 40
        return z

    monkeypatch.setattr(LanguageModel, "lower", with_sinks)
    found = collect_activations(model, LAYER, some_sequences(model), tmp_path / "rows")
    assert found.max_norm == SINK_FACTOR * found.median_norm
    outliers = found.norms > found.max_norm
    assert 0 < int(outliers.sum()) < len(found.norms) / 5
    kept = torch.cat([found.train, found.held_out("prose")])
    assert not outliers[kept].any()
    assert len(kept) == int((~outliers).sum())


@pytest.mark.parametrize("kept_bytes", [0, 1, 5001, 10**9])
def test_a_stopped_collection_is_continued(model, tmp_path, kept_bytes):
    sequences = some_sequences(model)
    whole = collect_activations(model, LAYER, sequences, tmp_path / "whole")
    stored = (tmp_path / "whole").read_bytes()
    (tmp_path / "part").write_bytes(stored[:kept_bytes])
    continued = collect_activations(model, LAYER, sequences, tmp_path / "part")
    assert torch.equal(whole.rows, continued.rows)
    assert (tmp_path / "part").read_bytes() == stored
