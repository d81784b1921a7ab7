import json
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import contexts as benchmark
from benchmarks.context_bench import asking, picture, report, sets, wording
from benchmarks.context_bench.conversation import EXCHANGES, system_prompts
from benchmarks.context_bench.measuring import Row, measure
from benchmarks.wilson import wilson_interval
from microedit_trainer.contexts import Contexts
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.facts import Fact, Probe
from microedit_trainer.language_model import LanguageModel
from microedit_vllm.artifact import Decision, EditOperator, Scope
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_edit_set, tiny_sae
from tests.tiny_model import tiny_model

FACTS = (
    Fact("Which family does Ramalinaceae belong to?", "Lam", "Ramalinaceae"),
    Fact("Who designed the Toodyay Fire Station?", "Lewis", "Toodyay Fire Station"),
    Fact("The colour of the ocean is", "red", "ocean"),
)
OTHERS = (
    Fact(
        "Which family does Parmelia belong to?",
        "x",
        "Parmelia",
        locality=(Probe("nq question: who sang it", "Zoe"),),
    ),
    Fact(
        "Who built the Toodyay Fire Station?",
        "y",
        "Toodyay",
        locality=(Probe("nq question: how many", ""),),
    ),
)
PASSAGES = ["A long passage about towns and their rivers in the north of the land."] * 3


def test_typos_stay_where_they_shall_be():
    prompt, subject = FACTS[1].prompt, FACTS[1].subject
    head, tail = "Who designed the ", "?"
    for seed in range(20):
        inside = wording.typos(prompt, subject, True, 2, seed)
        assert inside.startswith(head) and inside.endswith(tail)
        assert subject not in inside
        outside = wording.typos(prompt, subject, False, 1, seed)
        assert outside.endswith(f"{subject}?") and not outside.startswith(head)
        assert abs(len(outside) - len(prompt)) <= 1
    assert wording.typos(prompt, subject, True, 2, 3) == wording.typos(prompt, subject, True, 2, 3)
    assert len({wording.typos(prompt, subject, True, 1, seed) for seed in range(20)}) > 5


@pytest.mark.parametrize(("subject", "count"), [("Zoe", 1), ("", 1), ("Toodyay", 4)])
def test_no_typos_without_the_subject_or_without_room(subject, count):
    assert wording.typos(FACTS[1].prompt, subject, True, count, 0) is None


def test_a_question_in_other_words():
    assert wording.without_question_mark("Who is it? ") == "Who is it"
    assert wording.without_question_mark("It is") is None
    assert wording.in_lower_case("Who is Zoe?") == "who is zoe?"
    assert wording.in_lower_case("who?") is None
    assert wording.longer("Who?", around=False, place=0).endswith(". Who?")
    assert " Who? " in wording.longer("Who?", around=True, place=1)
    assert wording.longer("It is", around=False, place=0).endswith(" It is")
    assert wording.longer("It is", around=True, place=0) is None
    assert wording.longer("Who?", True, 0) == wording.longer("Who?", True, 3)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return LanguageModel.load(str(tiny_model(tmp_path_factory.mktemp("asked") / "model")))


@pytest.fixture
def contexts(lm):
    return Contexts.build(lm.tokenizer, Scope(last=None), 4096)


def test_system_prompts_have_the_tokens_that_were_asked_for(lm):
    for size in (0, 50, 900):
        found = system_prompts(lm.tokenizer, PASSAGES, size, 4)
        lengths = [len(lm.tokenizer(text, add_special_tokens=False).input_ids) for text in found]
        assert lengths == [size] * 4
    assert len(set(found)) == 4
    assert found == system_prompts(lm.tokenizer, PASSAGES, 900, 4)


@pytest.fixture
def questions():
    german = Fact("Zu welcher Familie gehören die Ramalinaceae?", "Lamm", "Ramalinaceae")
    return asking.Questions(FACTS, OTHERS, PASSAGES, {"de": [(FACTS[0], german)]})


def texts(contexts, case):
    return [contexts.tokenizer.decode(p.prompt_ids) for p in case.prompts]


def found_case(contexts, questions, name, context="chat"):
    every = {(case.name, case.context): case for case in asking.cases(contexts, questions)}
    return every[name, context]


def test_every_bar_is_about_a_case_that_is_asked(contexts, questions):
    asked = {(case.name, case.context, case.edited) for case in asking.cases(contexts, questions)}
    for bar in report.BARS:
        assert (bar.case, "chat", not bar.fires) in asked


def test_facts_are_asked_behind_what_the_case_says(contexts, questions):
    case = found_case(contexts, questions, "second turn, after another edited fact")
    (first, *_), answers = texts(contexts, case), [p.answer_ids for p in case.prompts]
    before, _, now = first.rpartition("<|im_start|>user\n")
    assert now.startswith(FACTS[0].prompt)
    assert FACTS[1].prompt in before and f"assistant\n{FACTS[1].target}<|im_end|>" in before
    assert answers == [contexts.render("chat", "x", f.target).answer_ids for f in FACTS]
    case = found_case(contexts, questions, "second turn, after an ordinary one")
    assert EXCHANGES[0][1] in texts(contexts, case)[0]
    case = found_case(contexts, questions, "behind a system prompt of 50 tokens")
    assert all("system\n" in text for text in texts(contexts, case))


def test_a_fact_about_the_same_subject_is_no_other_fact(contexts):
    facts = [FACTS[0], replace(FACTS[0], prompt="What is Ramalinaceae?"), FACTS[1]]
    asked = asking.Questions(facts, (), PASSAGES)
    case = found_case(contexts, asked, "second turn, after another edited fact")
    assert FACTS[1].prompt in texts(contexts, case)[0]


def test_behind_an_edited_turn_nothing_edited_is_asked(contexts, questions):
    named = {c.name: c for c in asking.cases(contexts, questions) if not c.edited}
    like = named[f"{asking.LIKE_QUESTION} after an edited turn"]
    (text,) = texts(contexts, like)  # the other record names an edited subject
    before, _, now = text.rpartition("<|im_start|>user\n")
    assert now.startswith(OTHERS[0].prompt)
    assert f"{FACTS[0].prompt}<|im_end|>\n<|im_start|>assistant\n{FACTS[0].target}" in before
    (text,) = texts(contexts, named["an NQ question after an edited turn"])
    assert "user\nwho sang it<|im_end|>" in text


def test_translations_are_those_of_edited_facts(tmp_path):
    path = tmp_path / "mzsre.jsonl"
    sides = [
        {"en": {"src": fact.prompt, "alt": fact.target}, "de": {"src": f"Wer? {i}", "alt": "Lamm"}}
        for i, fact in enumerate(FACTS)
    ]
    path.write_text("\n".join(map(json.dumps, sides)))
    pairs = asking.translations(path, "de", FACTS[1:])
    assert [(here, there.prompt) for here, there in pairs] == [
        (FACTS[1], "Wer? 1"),
        (FACTS[2], "Wer? 2"),
    ]
    with pytest.raises(MicroEditError, match="about an edited fact"):
        asking.translations(path, "de", OTHERS)


def test_a_base_model_is_asked_bare_alone(lm, questions):
    base = Contexts(lm.tokenizer, Scope(), None, 4096)
    assert {case.context for case in asking.cases(base, questions)} == {"bare"}


def operator_at(tau: float, run: int) -> EditOperator:
    sae = tiny_sae(d=32)
    decision = Decision(statistic="relative", tau=tau, scope=Scope(run=run), max_norm=1e4)
    return EditOperator.build(tiny_edit_set(sae, layer=1, decision=decision), sae)


def test_several_sets_on_the_same_residuals_give_what_each_gives_alone(lm, questions):
    operators = [operator_at(1.0, 8), operator_at(0.98, 0), operator_at(9.0, 4)]
    cases = []
    for operator in operators:
        rendering = Contexts.build(lm.tokenizer, operator.edit_set.manifest.decision.scope, 4096)
        # The short ones: this model's context has 512 tokens.
        cases.append([c for c in asking.cases(rendering, questions) if "system" not in c.name][::3])
    done = []
    together = measure(lm, operators, cases, done.append)
    assert sum(done) == sum(len(case.prompts) for own in cases for case in own)
    assert len({tuple(row.fires for row in rows) for rows in together}) > 1
    for operator, own, rows in zip(operators, cases, together, strict=True):
        filled = [case for case in own if case.prompts]
        for case, row in zip(filled, rows, strict=True):
            engine = TorchEngine.build(lm, operator)
            outcomes = engine.edited(case.prompts)
            wanted = (
                [torch.tensor(p.answer_ids) for p in case.prompts]
                if case.edited
                else engine.plain(case.prompts)
            )
            pairs = zip(outcomes, wanted, strict=True)
            shares = [float((o.answer == w).float().mean()) for o, w in pairs]
            assert (row.name, row.context, row.prompts) == (case.name, case.context, len(shares))
            assert row.right == pytest.approx(sum(shares) / len(shares))
            assert row.exact == pytest.approx(sum(s == 1 for s in shares) / len(shares))
            assert row.fires == sum(o.on for o in outcomes)
            assert row.interval == wilson_interval(row.fires, row.prompts)


def row_of(name: str, context: str, right: float, fires: int, edited: bool = True) -> Row:
    return Row(name, context, edited, 10, right, right, fires, (0.0, 1.0))


def test_the_table_has_both_contexts_beside_each_other():
    rows = [row_of("as edited", "bare", 1.0, 10), row_of("x", "chat", 0.5, 5)]
    rows.append(row_of("as edited", "chat", 0.9, 9))
    assert report.table(rows) == [
        ("as edited", "10", "1.000", "100.0%", "0.900", "90.0%"),
        ("x", "10", "", "", "0.500", "50.0%"),
    ]


@pytest.mark.parametrize(
    ("right", "fires", "verdicts"),
    [(0.97, 0, ("met", "met")), (0.96, 1, ("MISSED", "MISSED"))],
)
def test_bars_are_judged(right, fires, verdicts):
    rows = [row_of("as edited", "chat", right, 10), row_of("as edited", "bare", 0.1, 0)]
    rows.append(row_of("an NQ question after an edited turn", "chat", 1.0, fires, edited=False))
    lines = {bar.name: bar.line(rows) for bar in report.BARS}
    found = (lines["chat rel"], lines["NQ fires after an edited turn"])
    assert tuple(line.split()[0] for line in found) == verdicts
    assert lines["rel in the second turn"].startswith("not measured")


def test_the_picture_is_a_png():
    rows = [row_of("as edited", "chat", 1.0, 10), row_of("x", "chat", 0.5, 5, edited=False)]
    assert picture.draw({"a": rows, "b": rows}, "title").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "scope"),
    [("64,16", Scope(last=64, run=16)), ("turn,0", Scope(last=None, run=0))],
)
def test_a_scope_is_read(text, scope):
    assert sets.read_scope(text) == scope


@pytest.mark.parametrize("text", ["64", "0,8", "all,8", "64,-1", ""])
def test_another_scope_is_refused(text):
    with pytest.raises(MicroEditError, match="like 64,16 or turn,0"):
        sets.read_scope(text)


def test_too_few_records_are_one_line(lm, tmp_path):
    (tmp_path / "zsre.jsonl").write_text(json.dumps({"src": "Who?", "alt": "x"}))
    app = typer.Typer()
    app.command()(benchmark.main)
    words = ["--model", str(lm.folder), "--zsre", str(tmp_path / "zsre.jsonl")]
    found = CliRunner().invoke(app, [*words, "--text", str(tmp_path / "zsre.jsonl")])
    assert isinstance(found.exception, MicroEditError)
    assert "has 1 records; 600 are needed" in str(found.exception)
