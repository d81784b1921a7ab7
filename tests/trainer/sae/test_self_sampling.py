import pytest
import torch

from microedit_trainer.language_model import LanguageModel
from microedit_trainer.sae.self_sampling import TurnFrame, draw, sample_texts
from tests.tiny_model import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LanguageModel.load(str(tiny_model(tmp_path_factory.mktemp("tiny"))))


def test_draws_follow_the_probabilities_inside_the_nucleus_alone():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.006, 0.004]]).repeat(20_000, 1)
    drawn = draw(probabilities, torch.Generator().manual_seed(0)).flatten()
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    expected = torch.tensor([0.5, 0.3, 0.15, 0.04, 0, 0]) / 0.99
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert not shares[4:].any()


def test_a_template_is_taken_apart():
    frame = TurnFrame.of(tiny_tokenizer())
    assert frame == TurnFrame(
        header="<|im_start|>user\n",
        turn_break="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
    )
    sampled = "Who? <|im_end|>\n<|im_start|>assistant\nAda.<|im_end|>\n<|im_start|>user\nAnd"
    assert frame.parse(sampled) == ("Who?", "Ada.")
    assert frame.parse("a question without an end") == ("a question without an end", "")


def test_no_template_no_frame():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert TurnFrame.of(tokenizer) is None


def test_sampling_is_seeded_and_keeps_to_its_budget(model):
    reports = []
    first = sample_texts(model, 600, 40, 3, lambda *done: reports.append(done))
    assert first == sample_texts(model, 600, 40, 3)
    assert first != sample_texts(model, 600, 40, 4)
    assert reports[-1] == (600, 600)
    assert {text.source for text in first} >= {"self", "self turns"}


def test_a_base_model_samples_plain_text(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    assert {text.source for text in sample_texts(model, 200, 40, 0)} == {"self"}
