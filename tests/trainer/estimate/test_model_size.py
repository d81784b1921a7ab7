import pytest
import torch

from microedit_trainer.estimate import ModelSize
from microedit_trainer.language_model import LanguageModel
from microedit_vllm.errors import MicroEditError
from tests.tiny_architectures import CONFIGS, HIDDEN, LAYERS, tiny_architecture


def test_llama_3_8b_by_hand(llama3_8b):
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    layer = attention + 3 * 4096 * 14_336 + 2 * 4096
    assert llama3_8b.parameters == 8_030_261_248
    assert llama3_8b.layers == (layer,) * 32
    assert llama3_8b.weights == 2 * 8_030_261_248
    # Layer 31, the final norm and the head stay.
    kept = layer + 4096 + 128_256 * 4096
    assert llama3_8b.weights - llama3_8b.waiting(30) == 2 * kept == 1_486_905_344


def _bytes(*modules: torch.nn.Module) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_is_counted_is_what_is_loaded(architecture, tmp_path):
    folder = tiny_architecture(architecture, tmp_path)
    size = ModelSize.read(folder)
    lm = LanguageModel.load(str(folder))
    assert size.dtype == torch.float32
    assert size.weights == _bytes(lm.model)
    assert (size.hidden_size, len(size.layers), size.vocabulary) == (HIDDEN, LAYERS, 259)
    embedding = lm.model.get_input_embeddings()
    tied = embedding.weight is lm.model.get_output_embeddings().weight
    waiting = [*lm.decoder_layers[:2], *([] if tied else [embedding])]
    assert size.waiting(1) == _bytes(*waiting)
    assert size.above(1) * 4 == _bytes(lm.decoder_layers[2])
    assert ModelSize.read(folder, "bfloat16").weights == size.weights // 2


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(MicroEditError, match="cannot load a causal language model") as raised:
        ModelSize.read(tmp_path)
    assert "\n" not in str(raised.value)
