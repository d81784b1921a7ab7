import pytest
import torch

from microedit_trainer.text_sources import Text
from microedit_trainer.token_sequences import (
    TokenSequences,
    build_sequences,
    fill_shares,
    special_prefix,
)
from tests.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def build(*sources, tokens=10_000, length=32, share=0.2, seed=0) -> TokenSequences:
    return build_sequences(sources, TOKENIZER, tokens, length, share, seed)


def prose(count: int, name: str = "prose") -> list[Text]:
    return [Text(name, n, f"{name} {n}: {'abcdefgh'[n % 8] * (20 + n)}") for n in range(count)]


@pytest.mark.parametrize(
    ("sizes", "total", "shares"),
    [
        ({"a": 10, "b": 1000, "c": 1000}, 300, {"a": 10, "b": 145, "c": 145}),
        ({"a": 10, "b": 20}, 300, {"a": 10, "b": 20}),
        ({"a": 500}, 300, {"a": 300}),
    ],
)
def test_small_sources_leave_their_share_to_others(sizes, total, shares):
    assert fill_shares(sizes, total) == shares


def test_no_sequence_is_longer_than_asked():
    sequences = build(prose(30))
    assert int(sequences.lengths.max()) == 32
    assert int(sequences.lengths.sum()) == len(sequences.ids)
    assert int(sequences.starts.min()) == 1


def test_a_repeated_prefix_is_used_once_and_never_held_out():
    """A template's system prompt stands before every chat text."""
    system = "system: be kind. "
    texts = [Text("chat", n, f"{system}{n:03d} is a number", True) for n in range(20)]
    sequences = build(texts, length=64)
    shared = len(TOKENIZER(system).input_ids)
    assert (sequences.starts >= shared).sum() == len(sequences) - 1
    assert (sequences.starts[sequences.held_out] >= shared).all()


def test_a_copy_of_a_text_is_dropped():
    assert len(build([Text("a", n, "the very same words") for n in range(5)])) == 1


def test_a_groups_forms_are_held_out_together():
    texts = [
        Text(source, n, f"{source} {n} question", source == "chat")
        for n in range(40)
        for source in ("bare", "chat")
    ]
    sequences = build(texts)
    held = {
        name: {
            TOKENIZER.decode(ids).split()[1]
            for ids, source, out in zip(
                sequences.split(), sequences.source, sequences.held_out, strict=True
            )
            if bool(out) and sequences.names[source] == name
        }
        for name in sequences.names
    }
    assert held["bare"] == held["chat"]
    assert len(held["bare"]) == 8


def test_every_source_with_two_texts_has_held_out_text():
    sequences = build(prose(2, "small"), prose(100, "large"), share=0.01)
    held = sequences.source[sequences.held_out]
    assert set(held.tolist()) == {0, 1}


def test_seed_decides_what_is_held_out():
    first, again, other = (
        [ids for ids, held in zip(s.split(), s.held_out, strict=True) if bool(held)]
        for s in (build(prose(50), seed=seed) for seed in (1, 1, 2))
    )
    assert first == again
    assert first != other


def test_saved_sequences_come_back(tmp_path):
    sequences = build(prose(9), prose(5, "chat (self)"))
    sequences.save(tmp_path / "sequences")
    loaded = TokenSequences.load(tmp_path / "sequences")
    assert loaded.names == sequences.names
    for name in ("ids", "lengths", "starts", "source", "held_out"):
        assert torch.equal(getattr(loaded, name), getattr(sequences, name))


def test_a_bos_that_the_tokenizer_adds_leads_every_plain_sequence():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert special_prefix(tokenizer) == [1]
    sequences = build_sequences([prose(20)], tokenizer, 10_000, 16, 0.1, 0)
    assert all(ids[0] == 1 and len(ids) <= 16 for ids in sequences.split())
