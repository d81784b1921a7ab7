import io
import json
from dataclasses import replace

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.context_bench import asking
from benchmarks.context_bench.report import BARS
from benchmarks.quality import __main__ as command
from benchmarks.quality import recipe
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.figures import score, scores
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section, markdown_table, paragraphs, write_page
from benchmarks.quality.plan import FULL, QUICK, zsre
from benchmarks.quality.records import Records, Split, in_words
from benchmarks.quality.store import ResultStore, digest
from benchmarks.quality.tables import (
    ablations,
    budgets,
    carrying,
    contexts,
    decisions,
    main,
    ordinary,
    paraphrases,
    saes,
    selfcheck,
    subjects,
)
from benchmarks.quality.tables.experiments import main_experiments
from microedit_trainer.edit_run import EditRun
from microedit_trainer.facts import Fact, Probe
from microedit_trainer.solvers.targets import TargetSettings
from microedit_vllm.artifact import Scope
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_sae
from tests.tiny_model import tiny_model
from tests.trainer.tiny_edits import FACTS


def zsre_record(i: int) -> dict:
    return {
        "src": f"Who founded the club number {i} of Ur?",
        "alt": f"Zoe {i}",
        "rephrase": f"By whom was the club number {i} of Ur founded?",
        "loc": f"nq question: who sang song {i}",
        "loc_ans": "Ann",
        "subject": f"club number {i}",
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Records:
    folder = tmp_path_factory.mktemp("records")
    counterfact = [
        {
            "prompt": f"The river R{i} flows through",
            "target_new": "Oz",
            "subject": f"R{i}",
            "rephrase_prompt": f"R{i} is in",
            # Every fourth is about another edited river.
            "locality_prompt": f"The river {'R1' if i % 4 == 0 else f'Q{i}'} flows through",
            "locality_ground_truth": "Ur",
        }
        for i in range(40)
    ]
    selfcheck = [
        {
            "prompt": f"A passage about man {chr(97 + i % 26)}. He was",
            "target_new": "a king.",
            "subject": f"man {chr(97 + i % 26)}",
        }
        for i in range(60)
    ]
    for name, lines in (
        ("zsre", [zsre_record(i) for i in range(600)]),
        ("counterfact", counterfact),
        ("selfcheckgpt", selfcheck),
    ):
        (folder / f"{name}_dev.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for code in ("de", "fr"):
        sides = [{"src": f.prompt, "alt": f.target} for f in FACTS]
        foreign = [{"src": f"Wer? {i}", "alt": "Lamm"} for i in range(len(FACTS))]
        both = [{"en": here, code: there} for here, there in zip(sides, foreign, strict=True)]
        (folder / f"mzsre_{code}_dev.jsonl").write_text("\n".join(map(json.dumps, both)))
    (folder / "wikitext2_valid.txt").write_text("A passage about a town. " * 20)
    return Records(folder)


def no_traffic(lab, experiment) -> dict:
    """A request in place of a thousand."""
    return {"one": [lab.contexts(experiment).render("bare", "What is it that a king does?")]}


def prompts(facts) -> set[str]:
    return {fact.prompt for fact in facts}


@pytest.mark.parametrize("chosen", [zsre(10), zsre(300), zsre(300, 40), (("selfcheck", 10),)])
def test_edited_calibrating_and_near_records_are_never_the_same(records, chosen):
    split = records.split(chosen)
    assert len(split.edited) == sum(count for _, count in chosen)
    assert split.hold_out and split.near and split.subjects
    parts = [prompts(part) for part in (split.edited, split.hold_out, split.near)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    own = {fact.subject for fact in split.edited}
    assert not own & set(split.subjects)
    # Of CounterFact's locality prompts those about another river than an edited one are near.
    rivers = {prompt for prompt in parts[2] if "river" in prompt}
    wanted = {f"The river Q{i} flows through" for i in range(dict(chosen).get("counterfact", 0))}
    assert rivers == {prompt for prompt in wanted if int(prompt.split()[2][1:]) % 4}
    if chosen[0][0] == "selfcheck":
        assert not own & {fact.subject for fact in (*split.hold_out, *split.near)}


def test_where_all_of_zsre_is_edited_other_prompts_are_near(records):
    split = records.split(zsre(600, 40))
    assert len(split.edited) == 640
    assert split.hold_out == ()
    assert prompts(split.near) == {f"The river Q{i} flows through" for i in range(40) if i % 4}
    assert set(split.subjects) == {f"Man {chr(65 + i)}" for i in range(26)}
    assert [bool(fact.locality) for fact in split.edited] == [True] * 600 + [False] * 40


def test_only_held_out_records_are_in_the_saes_text(records):
    lines = records.held_out_lines().decode().splitlines()
    assert [json.loads(line) for line in lines] == [zsre_record(i) for i in range(300, 400)]


def test_a_missing_or_short_file_is_one_line(tmp_path):
    with pytest.raises(MicroEditError, match="is missing; name the records' folder"):
        Records(tmp_path).split(zsre(1))
    (tmp_path / "zsre_dev.jsonl").write_text(json.dumps(zsre_record(0)))
    with pytest.raises(MicroEditError, match="has 1 records, not 600"):
        Records(tmp_path).split(zsre(1))


def test_a_mix_is_named():
    assert in_words(zsre(600, 1000)) == "600 ZsRE, 1000 CounterFact"


def test_results_are_measured_once_each(tmp_path):
    store, measured = ResultStore(tmp_path / "rows"), []

    def measure(value):
        measured.append(value)
        return {"value": [value, 0.1]}

    for _ in range(2):
        for value in (1, 2):
            described = {"value": value, "scope": Scope()}
            assert store.get("a", described, lambda v=value: measure(v)) == {"value": [value, 0.1]}
    assert measured == [1, 2]
    store.get("b", {"value": 1, "scope": Scope()}, lambda: measure(3))
    assert measured == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        store.get("a", {"value": 4}, lambda: {"x": 1 / 0})
    assert len(list((tmp_path / "rows").iterdir())) == 3  # nothing half-written


def test_a_description_tells_scopes_and_solvers_apart():
    assert digest({"a": Scope(run=8)}) != digest({"a": Scope(run=16)})
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})


def section(name: str, cell: str, **pictures) -> Section:
    return Section(name, f"About {name}", "Some\ntext.", ("a", "b"), [(cell, "1|2")], pictures)


def test_a_page_keeps_the_sections_that_are_not_built(tmp_path):
    page, order = tmp_path / "docs" / "quality.md", ("one", "two", "three")
    write_page(page, "Model: x.", [section("three", "old"), section("one", "first")], order)
    write_page(page, "Model: y.", [section("three", "new", rows=b"png")], order)
    text = page.read_text()
    assert text.index("About one") < text.index("About three")
    assert "| first | 1\\|2 |" in text and "Some text." in text
    assert "new" in text and "old" not in text
    assert "Model: y." in text and "Model: x." not in text
    assert "![About three](quality_rows.png)" in text
    assert (page.parent / "quality_rows.png").read_bytes() == b"png"
    write_page(page, "Model: y.", [], order)
    assert page.read_text() == text


def test_markdown():
    assert paragraphs("\na\nb\n\nc\n") == "a b\n\nc"
    assert markdown_table(("x", "y"), [("1", "2")]) == "| x | y |\n| --- | --- |\n| 1 | 2 |"


def test_a_missed_bar_stands_behind_its_figure():
    assert score(0.91, 0.9) == "0.910"
    assert score(0.89, 0.9) == "**0.890** (< 0.9)"
    assert score(None, 0.9) == "–"
    found = {"rel": 1.0, "gen": 0.5, "loc": 1.0, "near": None, "near_swapped": 0.9}
    assert scores(found, {"gen": 0.6})[:4] == ["1.000", "**0.500** (< 0.6)", "1.000", "–"]


@pytest.fixture(scope="module")
def lab(records, tmp_path_factory) -> Lab:
    """A tiny model, an SAE of random numbers, and four facts in place of all records."""
    folder = tmp_path_factory.mktemp("lab")
    model = tiny_model(folder / "model")
    report = {"layer": 1, "max_norm": 1e4, "mean_distance": 30.0, "fvu": 0.5}
    replace(tiny_sae(d=32, n=256, k=8), report=report).save(folder / "sae")

    class Few(Records):
        def split(self, chosen):
            probe = Probe("nq question: who sang it", "Ann")
            near = [Fact("Who is the king of Ur?", "Bo", locality=(probe,))]
            return Split(FACTS[: chosen[0][1]], (), near, ["Ur", "Oz"])

    console = Console(file=io.StringIO())
    return Lab(str(model), Few(records.folder), folder / "work", folder / "sae", console, True)


def test_a_row_is_measured_once_and_again_when_something_changed(lab, monkeypatch):
    made = []
    edit = EditRun.edit

    def counted(self, facts, out, progress):
        made.append(len(facts))
        return edit(self, facts, out, progress)

    monkeypatch.setattr(EditRun, "edit", counted)
    first = lab.scores(Experiment(zsre(2)))
    assert lab.scores(Experiment(zsre(2))) == first
    assert (first["facts"], first["near"], made) == (2, 1, [2])
    assert set(first) >= {"bare", "chat", "tau", "rows", "seconds_per_edit", "share_of_decoder"}
    assert sum(first["rows"]) == round(first["share_of_decoder"] * 256)
    lab.scores(Experiment(zsre(2), options=budgets.options(20)))
    lab.scores(Experiment(zsre(2), settings={"scope": Scope(last=8, run=0)}))
    both = lab.scores(Experiment(zsre(2), solver="sequential", options={"steps_edit": 2}))
    assert len(both["rows"]) == 1
    assert made == [2] * 4
    lab.forget_results()
    lab.scores(Experiment(zsre(2)))
    assert made == [2] * 5
    assert list((lab.work / "targets").glob("*.safetensors"))


def test_tables_are_built_from_their_experiments(lab, monkeypatch):
    plan = replace(
        QUICK,
        some=zsre(2),
        more=zsre(3),
        all_records=zsre(3),
        selfcheck=zsre(3),
        budgets={zsre(2): (20, None)},
        sequential_budgets={zsre(2): (20, None)},
    )
    found = main.section(lab, plan)
    assert [line[:3] for line in found.lines[::2]] == [
        ["2 ZsRE", "joint", "bare"],
        ["3 ZsRE", "joint", "bare"],
        ["3 ZsRE", "joint", "bare"],
        ["2 ZsRE", "sequential", "bare"],
    ]
    monkeypatch.setattr(decisions, "traffic", no_traffic)
    monkeypatch.setattr(decisions, "STATISTICS", {"one": decisions.gain})
    for table in (main, paraphrases, subjects, selfcheck, budgets, decisions):
        found = table.section(lab, plan)
        assert {len(line) for line in found.lines} == {len(found.header)}
        assert all(image.startswith(b"\x89PNG") for image in found.pictures.values())


@pytest.mark.parametrize(("tau", "same"), [(1e3, "always_on"), (1e-3, "unedited")])
def test_paraphrases_are_served_as_the_switch_says(lab, monkeypatch, tau, same):
    """Here they are the prompts themselves, for which a target of one's own answers."""
    strong = TargetSettings(steps=100, lr=0.3, penalty=0.05)
    facts = [replace(fact, paraphrases=(fact.prompt,)) for fact in FACTS[:3]]
    monkeypatch.setattr(paraphrases, "TargetSettings", lambda: strong)
    monkeypatch.setattr(Records, "split", lambda *_: Split(facts, (), (), ()))
    own = replace(lab, records=Records(lab.records.folder))
    experiment = Experiment(zsre(3), options={"targets": strong}, settings={"tau": tau})
    found = paraphrases._by_records(own, experiment)["3 ZsRE"]
    assert (found["count"], found["on"], found["own_target"]) == (3, float(tau > 1), 1.0)
    assert found["served"] == found[same] and found["always_on"] > found["unedited"]
    assert found["other_on"] == float(tau > 1)
    assert (found["other_unchanged"] == 1) == (tau < 1)


def test_other_questions_are_other_records_wordings():
    asked = [(fact.prompt, fact.target) for fact in paraphrases._other_questions(FACTS[:2])]
    assert asked == [
        ("The inventor of the Australia was", FACTS[0].target),
        ("The capital of telephone is", FACTS[1].target),
    ]
    assert paraphrases._other_questions([Fact("No subject is named here", "x")]) == []


def test_facts_that_share_their_subject_are_told_apart():
    facts = [Fact("a", "x", subject="A"), Fact("b", "y", subject="A"), Fact("c", "z", subject="C")]
    nameless = [Fact("d", "x"), Fact("e", "y")]
    found = subjects.by_subjects([*facts, *nameless])
    assert found == {"one fact": [facts[2], *nameless], "several": facts[:2]}
    assert subjects.by_subjects(nameless) == {"one fact": nameless}


def test_gen_of_both_kinds_of_subjects_makes_up_the_main_tables(lab, monkeypatch):
    asked = [replace(fact, paraphrases=(fact.prompt,)) for fact in FACTS[:3]]
    facts = [asked[0], *(replace(fact, subject="Ur") for fact in asked[1:])]
    monkeypatch.setattr(Records, "split", lambda *_: Split(facts, (), (), ()))
    own = replace(lab, records=Records(lab.records.folder))
    experiment = Experiment(zsre(3), settings={"tau": 1e3})
    alone, shared = subjects._by_subjects(own, experiment).values()
    assert (alone["facts"], shared["facts"]) == (1, 2)
    for context in subjects.CONTEXTS:
        both = (alone[context][0] + 2 * shared[context][0]) / 3
        assert both == pytest.approx(own.scores(experiment)[context]["gen"])
        assert alone[context][1] == shared[context][1] == 1.0


@pytest.mark.parametrize(("fires", "shown"), [(2, "2 of 1000"), (3, "**3 of 1000** (> 2)")])
def test_ordinary_traffic_has_a_row_for_each_size(lab, monkeypatch, fires, shown):
    found = {"fires": fires, "total": 1000, "interval": [0.0005, 0.0073], "smallest_ard": 0.97}
    found |= {"tau": 0.9, "kinds": {"code": [fires, 75], "chat": [0, 925]}}
    monkeypatch.setattr(Lab, "row", lambda self, kind, experiment, measure: found)
    table = ordinary.section(lab, QUICK)
    assert [line[0] for line in table.lines] == [
        *("4 ZsRE", "30 ZsRE", "20 ZsRE, 10 CounterFact"),
        *("10 ZsRE", "30 ZsRE", "10 ZsRE, 10 CounterFact", "10 ZsRE"),
    ]
    expected = [shown, "0.05% to 0.73%", "0.970", "0.900", f"{fires} of 75 code"]
    assert all(line[2:] == expected for line in table.lines)


def test_the_shipped_statistic_decides_as_the_set_does(lab, monkeypatch):
    monkeypatch.setattr(decisions, "traffic", no_traffic)
    experiment = Experiment(zsre(3))
    own = lab.scores(experiment)
    found = decisions.decided(lab, experiment, decisions.relative)
    assert found["tau"] == pytest.approx(own["tau"], rel=1e-5)
    assert found["bare"] == pytest.approx(own["bare"]) and found["chat"] == own["chat"]
    other = decisions.decided(lab, experiment, decisions.absolute)
    assert other["tau"] != pytest.approx(own["tau"], rel=1e-2)


def test_statistics_of_a_run():
    dist, dist0 = torch.tensor([[1.0, 4.0], [2.0, 2.0]]), torch.tensor([[2.0, 16.0], [2.0, 2.0]])
    found = {
        statistic: statistic(dist, dist0, 10.0).tolist()
        for statistic in decisions.STATISTICS.values()
    }
    expected = {
        decisions.relative: [5 / 18, 1.0],
        decisions.absolute: [0.25, 0.2],
        decisions.gain: [1 - 0.65, 1.0],
        decisions.mean_ratio: [0.375, 1.0],
        decisions.geometric_ratio: [0.125**0.5, 1.0],
        decisions.worst_ratio: [0.5, 1.0],
    }
    assert found == {statistic: pytest.approx(want) for statistic, want in expected.items()}


@pytest.mark.parametrize("name", decisions.STATISTICS)
def test_the_smallest_run_decides(lab, name):
    statistic = decisions.STATISTICS[name]
    experiment = Experiment(zsre(2), settings={"scope": Scope(run=2)})
    operator = decisions.DecidingOperator.of(lab.engine(experiment).operator, statistic)
    dist, dist0 = torch.tensor([9.0, 1.0, 2.0, 9.0]), torch.tensor([10.0, 4.0, 4.0, 10.0])
    own = statistic(dist[None, 1:3], dist0[None, 1:3], operator.alpha)
    assert operator.ard(dist, dist0) == own
    assert operator.ard(dist[:1], dist0[:1]) == torch.inf
    assert operator.ard(dist[1:3], dist0[1:3]) == own
    assert operator.with_tau(0.5).is_on(torch.tensor([0.4, 0.6])).tolist() == [True, False]


def test_contexts_and_variations_are_built_too(lab, monkeypatch):
    # This model's context has 512 tokens.
    monkeypatch.setattr(asking, "SYSTEM_TOKENS", (0, 50))
    monkeypatch.setattr(asking, "chat_requests", lambda: ["Write a poem."])
    monkeypatch.setattr(contexts, "SCOPES", contexts.SCOPES[:1])
    monkeypatch.setattr(ablations, "SOLVER", {"one": {"theta": 2.0}})
    monkeypatch.setattr(ablations, "SETTINGS", {"two": {"contexts": ("bare",)}})
    monkeypatch.setattr(ablations, "AMONG_MORE", ("one",))
    plan = replace(QUICK, some=zsre(2), ablated=(zsre(2), zsre(3)))
    found = contexts.section(lab, plan)
    assert found.header[3::2] == ["window:16 in last:64", "window:8 in last:64"]
    assert {line[0] for line in found.lines} >= {bar.case for bar in BARS[:1] + BARS[2:]}
    assert {len(line) for line in found.lines} == {len(found.header)}
    assert contexts.section(lab, plan) == found
    found = ablations.section(lab, plan)
    assert [line[1] for line in found.lines] == ["as shipped", "one", "two", "as shipped", "one"]
    assert {len(line) for line in found.lines} == {len(found.header)}


def test_what_carries_is_varied_on_the_largest_set_and_its_sae(lab, monkeypatch):
    varied = carrying.experiments(FULL)
    shipped = varied.pop("as shipped")
    assert shipped == main_experiments(FULL)["all"]
    sae = tiny_sae()
    solver = shipped.build_solver(sae)
    assert solver.is_carried(1600) and shipped.build_settings()["scope"] == Scope(last=16, run=2)
    for found in varied.values():
        assert (found.facts, found.sae, found.timed) == (shipped.facts, shipped.sae, False)
        assert found.build_solver(sae) != solver
    assert varied["not carried"].build_settings()["scope"] == Scope()
    scores = {"rel": 1.0, "gen": 0.5, "loc": 1.0, "near": 1.0, "near_swapped": 1.0}
    figures = {"bare": scores, "chat": scores, "tau": 0.9, "rows": [1, 2], "share_of_decoder": 0.1}
    monkeypatch.setattr(Lab, "scores", lambda self, experiment: figures)
    found = carrying.section(lab, QUICK)
    assert [line[1] for line in found.lines] == ["not carried", "carried", "as shipped", *varied]
    without, carried = (e.build_solver(sae) for e in carrying.between(FULL).values())
    assert (without.is_carried(1000), carried.is_carried(1000)) == (False, True)
    assert replace(without, carries=True) == carried
    assert {len(line) for line in found.lines} == {len(found.header)}


def test_every_variation_changes_something_and_can_be_solved():
    sae = replace(tiny_sae(), report={"mean_distance": 1.0})
    for plan in (FULL, QUICK):
        shipped = ablations.experiments(plan, plan.ablated[0])["as shipped"]
        assert shipped == main_experiments(plan)["some"]
        varied = ablations.experiments(plan, plan.ablated[0]) | saes.experiments(plan, plan.some)
        assert set(ablations.experiments(plan, plan.ablated[1])) < set(varied)
        among_more = saes.experiments(plan, plan.more)
        assert among_more["as shipped"] == main_experiments(plan)["more"]
        assert {e.facts for e in among_more.values()} == {plan.more}
        for name, found in varied.items():
            found.build_solver(sae)
            if name != "as shipped":
                assert found.build_settings() != shipped.build_settings() or (
                    (found.build_solver(sae), {**recipe.SAE, **found.sae})
                    != (shipped.build_solver(sae), recipe.SAE)
                ), name


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "main,magic"], "no table 'magic'"), (["--quick"], "name another --out")],
)
def test_a_wrong_option_is_one_line(words, message):
    app = typer.Typer()
    app.command()(command.quality)
    found = CliRunner().invoke(app, words)
    assert isinstance(found.exception, MicroEditError) and message in str(found.exception)
