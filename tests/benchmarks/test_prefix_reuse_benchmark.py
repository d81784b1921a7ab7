import pytest

from benchmarks import prefix_reuse
from benchmarks.offline_engine import answer
from microedit_trainer.demo.server import ENVIRONMENT
from microedit_vllm.errors import MicroEditError
from tests.microedit_vllm.engine.in_process import engine_here
from tests.microedit_vllm.engine.tiny_served import tiny_served
from tests.tiny_model import tiny_tokenizer

BLOCK, ANSWER = 32, 20
Sent = prefix_reuse.Sent


def text_of(tokenizer, tokens):
    return tokenizer.decode(list(tokens))


def test_pieces_put_together_are_the_chat_template():
    tokenizer = tiny_tokenizer()
    chat = prefix_reuse.ChatPieces(tokenizer, "Be kind.")
    first, second = chat.conversation("edited", ["Who?", "Where?"]).turns
    roles = ("system", "user", "assistant", "user")
    words = ("Be kind.", "Who?", "Me.", "Where?")
    messages = [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    said = (*first, *tokenizer("Me.", add_special_tokens=False).input_ids, *second)
    assert text_of(tokenizer, said) == wanted


def test_a_model_without_a_chat_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(MicroEditError, match="no chat template"):
        prefix_reuse.ChatPieces(tokenizer, "Be kind.")


def test_the_trace_has_what_was_asked_for():
    tokenizer = tiny_tokenizer()
    chat = prefix_reuse.ChatPieces(tokenizer, "Be kind.")
    trace = prefix_reuse.make_trace(chat, ["Where is Zork?", "Who is Zork?"], 5, edited=2, turns=3)
    assert [c.kind for c in trace] == ["edited"] * 2 + ["unedited"] * 3 + ["repeated"] * 4
    assert all(len(c.turns) == 3 for c in trace)
    for conversation in trace:
        texts = [text_of(tokenizer, turn) for turn in conversation.turns]
        asks_fact = ["Zork" in text for text in texts]
        assert set(asks_fact) == {conversation.kind == "edited" or conversation is trace[5]}
        assert (len(set(texts)) == 1) == (conversation.kind == "repeated")
    unedited = [c.turns for c in trace if c.kind == "unedited"]
    assert len({turn for turns in unedited for turn in turns}) == 9


def test_rates_are_split_by_kind():
    sent = [
        Sent("edited", 0, 10, 0, True),
        Sent("edited", 1, 30, 20, False),
        Sent("unedited", 0, 60, 55, None),
    ]
    found = prefix_reuse.hit_rates(sent)
    assert found["edited"] == {
        "requests": 2,
        "switched_on": 1,
        "prompt_tokens": 40,
        "cached": 20,
        "rate": 0.5,
    }
    assert found["all"]["rate"] == 0.75


class Here:
    """An engine of this process, as `play` wants it."""

    def __init__(self, llm, edited):
        self.llm, self.edited = llm, edited

    def generate(self, prompts, **sampling):
        return answer(self.llm, [list(p) for p in prompts], self.edited, **sampling)


def test_real_engines_play_the_trace(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    served = tiny_served(tmp_path)
    ask = prefix_reuse.Conversation
    long, fact, other = served.unrelated[7], served.edited[4], served.unrelated[6]
    trace = [
        ask("edited", (tuple(fact), tuple(other))),
        ask("unedited", (tuple(long), tuple(other))),
        ask("repeated", (tuple(long),) * 2),
    ]
    rates, sent = {}, {}
    for kind, extra in (
        ("plain", {}),
        ("microedit", {"additional_config": {"microedit": {"edit_set": str(served.edit_set)}}}),
    ):
        arguments = {"max_model_len": 512, "block_size": BLOCK, "max_num_seqs": 4, **extra}
        with engine_here(served.model, **arguments) as llm:
            sent[kind] = prefix_reuse.play(Here(llm, bool(extra)), trace, answer_tokens=ANSWER)
            rates[kind] = prefix_reuse.hit_rates(sent[kind])
    first, second = (
        {kind: {s.kind: s for s in those if s.turn == turn} for kind, those in sent.items()}
        for turn in (0, 1)
    )
    assert {kind: s.on for kind, s in first["microedit"].items()} == {
        "edited": True,
        "unedited": False,
        "repeated": False,
    }
    assert {s.on for s in sent["plain"]} == {None}

    def blocks(tokens):
        return tokens // BLOCK * BLOCK

    # All of the first turn but for the token sampled last, whose KV was never computed.
    assert second["plain"]["edited"].cached == blocks(len(fact) + ANSWER - 1)
    # What was computed with edits is found by nobody.
    assert second["microedit"]["edited"].cached == blocks(len(fact) - 1)
    for kind in ("unedited", "repeated"):
        said = len(long) + (ANSWER if kind == "unedited" else 0)
        assert second["plain"][kind].cached == blocks(said - 1)
        assert second["microedit"][kind].cached == second["plain"][kind].cached
    assert 0 < rates["microedit"]["edited"]["rate"] < rates["plain"]["edited"]["rate"]
