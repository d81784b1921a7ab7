from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from microedit_trainer.language_model import (
    LanguageModel,
    find_decoder_layers,
    length_batches,
    pad_batch,
    resolve_folder,
)
from microedit_vllm.artifact import fingerprint_model
from microedit_vllm.errors import MicroEditError
from tests.tiny_architectures import CONFIGS, HIDDEN, LAYERS, tiny_architecture
from tests.tiny_model import tiny_model, tiny_tokenizer

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
OTHERS = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, sliding_window=4, final_logit_softcapping=2.0)
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**SMALL, logits_scaling=4.0, embedding_multiplier=3.0)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=4, n_positions=32)
    ),
    "gpt2, head of its own": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=16,
            n_layer=3,
            n_head=4,
            n_positions=32,
            tie_word_embeddings=False,
        )
    ),
    "llama, tied head": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt_neox, one branch after the other": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL, use_parallel_residual=False)
    ),
}


@pytest.fixture
def ids():
    return torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(0))


def other(name: str) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OTHERS[name]().eval().requires_grad_(False)
    return LanguageModel(model, None, name, Path(), find_decoder_layers(model))


@torch.no_grad()
def assert_the_cut_changes_nothing(lm, ids, layer):
    z = lm.lower(ids, layer)
    logits = lm.logits(lm.upper(z, layer))
    assert torch.equal(logits, lm.model(input_ids=ids, use_cache=False).logits.float())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_two_halves_are_the_model_bit_for_bit(lm, ids, layer):
    assert_the_cut_changes_nothing(lm, ids, layer)


@pytest.mark.parametrize("name", OTHERS)
def test_the_two_halves_are_other_architectures_too(name, ids):
    """Soft caps, scaled logits and embeddings, sliding windows, other names."""
    assert_the_cut_changes_nothing(other(name), ids, 1)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_proven_architecture_is_cut_and_fingerprinted(architecture, ids, tmp_path):
    """What the server is proven on, the trainer can edit."""
    folder = tiny_architecture(architecture, tmp_path)
    lm = LanguageModel.load(str(folder))
    assert (lm.num_layers, lm.hidden_size) == (LAYERS, HIDDEN)
    with torch.no_grad():
        states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(lm.lower(ids, 1), states[2])
    for layer in range(LAYERS):
        assert_the_cut_changes_nothing(lm, ids, layer)
    other_weights = tiny_architecture(architecture, tmp_path / "other", seed=1)
    assert fingerprint_model(other_weights) != fingerprint_model(folder)


def test_the_text_model_beside_an_image_encoder_is_cut(ids, tmp_path):
    """Gemma 3 from 4B on; here the encoder has as many layers and comes first."""
    text = CONFIGS["Gemma3ForCausalLM"]()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = LanguageModel.load(str(tmp_path))
    assert lm.decoder_layers is lm.model.model.language_model.layers
    for layer in range(LAYERS):
        assert_the_cut_changes_nothing(lm, ids, layer)


def test_gemma2_s_attention_scores_are_capped(ids, tmp_path):
    folder = tiny_architecture("Gemma2ForCausalLM", tmp_path)
    capped = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        states = capped(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(LanguageModel.load(str(folder)).lower(ids, 1), states[2])


def test_a_model_with_inputs_for_each_layer_is_refused():
    """The upper half would have to know the tokens, and gets placeholders."""
    model = OTHERS["gpt2"]()
    model.config.hidden_size_per_layer_input = 8
    with pytest.raises(MicroEditError, match="embeddings of its tokens to every layer"):
        find_decoder_layers(model)


def test_the_lower_half_stops_at_the_cut(lm, ids):
    ran = []
    hooks = [
        layer.register_forward_hook(lambda *_, n=number: ran.append(n))
        for number, layer in enumerate(lm.decoder_layers)
    ]
    lm.lower(ids, 1)
    assert ran == [0, 1]
    for hook in hooks:
        hook.remove()


def test_z_is_what_the_layer_puts_out(lm, ids):
    with torch.no_grad():
        states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(lm.lower(ids, 1), states[2])


def test_right_padding_does_not_change_real_tokens(lm, ids):
    sequences = [ids[0].tolist(), ids[1, :5].tolist()]
    together = lm.lower(pad_batch(sequences, pad=7), 1)
    alone = lm.lower(ids[1:, :5], 1)
    torch.testing.assert_close(together[1, :5], alone[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        upper = lm.upper(together, 1)[1, :5]
        torch.testing.assert_close(upper, lm.upper(alone, 1)[0], rtol=1e-5, atol=1e-5)


def test_the_upper_half_has_a_gradient_in_z(lm, ids):
    z = lm.lower(ids, 1).clone().requires_grad_()
    lm.logits(lm.upper(z, 1)[:, -1]).logsumexp(-1).sum().backward()
    assert bool((z.grad.norm(dim=-1) > 0).all())
    assert all(p.grad is None for p in lm.model.parameters())


def test_a_failure_leaves_the_model_whole(lm, ids):
    before = lm.lower(ids, 2)
    hooks = [len(layer._forward_hooks) for layer in lm.decoder_layers]
    with pytest.raises(RuntimeError):
        lm.upper(torch.zeros(1, 4, 5), 1)  # of another width
    with pytest.raises(IndexError):
        lm.lower(torch.full((1, 3), 10**6), 1)  # no such token
    assert torch.equal(lm.lower(ids, 2), before)
    assert [len(layer._forward_hooks) for layer in lm.decoder_layers] == hooks
    assert not any("forward" in vars(layer) for layer in lm.decoder_layers)


def test_what_the_model_says_of_itself(lm):
    assert (lm.num_layers, lm.hidden_size, lm.max_length) == (3, 32, 512)
    assert lm.dtype == torch.float32
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert not lm.model.training


def test_the_dtype_can_be_chosen(tmp_path):
    folder = str(tiny_model(tmp_path / "model"))
    assert LanguageModel.load(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [-1, 3, 99])
def test_a_layer_out_of_range_is_refused(lm, layer):
    with pytest.raises(MicroEditError, match=f"layer {layer} does not exist.*layers 0 to 2"):
        lm.check_layer(layer)


def test_layers_in_range_pass(lm):
    for layer in range(3):
        lm.check_layer(layer)


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere", "a/b/c", ".hidden"])
def test_what_can_only_be_a_folder_is_never_asked_of_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail(name))
    with pytest.raises(MicroEditError, match="is not a model folder"):
        resolve_folder(name)


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MicroEditError, match="is not a model folder"):
        resolve_folder(str(tmp_path / "file"))


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("failure", [OSError("no network"), ValueError("bad id")])
def test_a_hub_that_gives_nothing_is_one_line(failure, monkeypatch):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(MicroEditError, match="neither a folder nor a model that the hub gives"):
        resolve_folder("someone/something")


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(MicroEditError, match="cannot load a causal language model") as raised:
        LanguageModel.load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_damaged_weights_are_one_line(tmp_path):
    folder = tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MicroEditError, match="cannot load a causal language model"):
        LanguageModel.load(str(folder))


def test_a_model_without_a_list_of_layers_is_refused():
    model = OTHERS["gpt2"]()
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    with pytest.raises(MicroEditError, match="no list of 3 decoder layers"):
        find_decoder_layers(model)


def test_batches_hold_sequences_of_like_lengths_each_once():
    batches = list(length_batches([5, 1, 4, 1, 3], 2))
    assert batches == [[1, 3], [4, 2], [0]]
    assert list(length_batches([], 2)) == []
