import json
from dataclasses import replace
from pathlib import Path

import pytest

from microedit_trainer.facts import Fact, Probe, find_conflicts, read_facts
from microedit_vllm.errors import MicroEditError

DATA = Path(__file__).parents[4] / "shared" / "data"

OWN = {
    "prompt": "The capital of Australia is",
    "target": "Melbourne",
    "subject": "Australia",
    "paraphrases": ["Australia's capital is"],
    "locality": ["The capital of France is", {"prompt": "2 + 2 is", "answer": "4"}],
    "portability": [{"prompt": "The first city of Australia is", "answer": "Melbourne"}],
}
ZSRE = {
    "subject": "Ramalinaceae",
    "src": "Which family does Ramalinaceae belong to?",
    "pred": "Ramalinales",
    "rephrase": "What family are Ramalinaceae?",
    "alt": "Lamiinae",
    "answers": ["Lecanorales"],
    "loc": "nq question: what is a dog",
    "loc_ans": "an animal",
}
COUNTERFACT = {
    "case_id": 2,
    "prompt": "Toko Yasuda, the",
    "target_new": "piano",
    "subject": "Toko Yasuda",
    "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at",
    "locality_prompt": "John Lennon performs on the",
    "locality_ground_truth": "guitar",
}
SELFCHECK = {
    "prompt": "This is a Wikipedia passage about nate saint.",
    "target_new": "He flew.",
    "locality_prompt": "Someone else",
    "locality_ground_truth": " was born",
}


# The layouts below are those of the published files; the facts in them are made up.
WITH_A_HOP = ZSRE | {"portability": {"New Question": "Which order?", "New Answer": "Beetles"}}
ROME_COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Marie Duval",
    },
    "paraphrase_prompts": ["Rain fell. Marie Duval spoke", "Marie Duval grew up speaking"],
    "neighborhood_prompts": ["The mother tongue of Luc Petit is", "Luc Petit spoke"],
    "attribute_prompts": ["The mother tongue of Ann Smith is"],
}
WIKI_RECENT = {
    "subject": "Ada Stern",
    "prompt": "The place of death of Ada Stern is",
    "target_new": "Berlin",
    "portability": {
        "Logical_Generalization": [
            {"prompt": "Is Ada Stern still alive?", "ground_truth": [["no"], ["she is dead"]]}
        ],
        "Reasoning": [
            {
                "prompt": "The continent where Ada Stern died is",
                "ground_truth": [["Europe", "European continent"]],
            },
            {"prompt": "The mayor of the place where she died is", "ground_truth": [[""]]},
        ],
        "Subject_Aliasing": [
            {"prompt": "The place of death of A. Stern is", "ground_truth": [["Berlin"]]}
        ],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The father of Ada Stern is", "ground_truth": [["Albert Stern"]]}
        ],
        "Forgetfulness": [],
    },
}
KNOWEDIT_ZSRE = {
    "subject": "Epaspidoceras",
    "target_new": "Noctuidae",
    "prompt": "Which family does Epaspidoceras belong to?",
    "ground_truth": ["Aspidoceratidae"],
    "rephrase_prompt": "What family are Epaspidoceras?",
    "cond": "Geometridae >> Noctuidae || Which family?",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The taxon rank of Epaspidoceras is", "ground_truth": ["genus"]}
        ]
    },
    "portability": {
        "Reasoning": [{"prompt": "What are they called?", "ground_truth": "Owlet moths"}]
    },
}
WIKI_COUNTERFACT = {
    "subject": "Fred Pies",
    "prompt": "The position held by Fred Pies is",
    "target_new": "bishop",
    "ground_truth": "mayor",
    "rephrase": ["Fred Pies is the", "Fred Pies works as"],
    "portability": {
        "Subject_Aliasing": [{"prompt": "Fred of Pies is the", "ground_truth": "bishop"}],
        "Reasoning": None,
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": ["The gender of Fred Pies is", "x"], "ground_truth": "male"}
        ],
        "Forgetfulness": [{"prompt": "Fred Pies, no bishop, is", "ground_truth": "mayor"}],
    },
}
WIKIBIO = {
    "text": "This is a Wikipedia passage about john roe. John Roe was a physician.",
    "labels": "He studied in London.",
    "concept": "john roe",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The field of john roe is", "ground_truth": ["medicine"]}
        ]
    },
}
MZSRE = {
    "en": WITH_A_HOP,
    "de": {
        "subject": "Ramalinaceae",
        "src": "Zu welcher Familie gehören die Ramalinaceae?",
        "rephrase": "Welche Familie haben die Ramalinaceae?",
        "alt": "Bockkäfer",
        "loc": "was ist ein hund",
        "loc_ans": "ein Tier",
        "portability": {"New Question": "Welche Ordnung?", "New Answer": "Käfer"},
    },
}


def test_own_records(write):
    assert read_facts(write(OWN, "", {"prompt": "p", "target": "t"}, "")) == [
        Fact(
            "The capital of Australia is",
            "Melbourne",
            "Australia",
            ("Australia's capital is",),
            (Probe("The capital of France is", ""), Probe("2 + 2 is", "4")),
            (Probe("The first city of Australia is", "Melbourne"),),
        ),
        Fact("p", "t"),
    ]


HOP = (Probe("Which order?", "Beetles"),)
ZSRE_FACT = Fact(
    "Which family does Ramalinaceae belong to?",
    "Lamiinae",
    "Ramalinaceae",
    ("What family are Ramalinaceae?",),
    (Probe("nq question: what is a dog", "an animal"),),
)
EXPECTED = {
    "zsre": (ZSRE, ZSRE_FACT),
    "zsre with portability": (WITH_A_HOP, replace(ZSRE_FACT, portability=HOP)),
    "counterfact": (
        COUNTERFACT,
        Fact(
            "Toko Yasuda, the",
            "piano",
            "Toko Yasuda",
            ("Toko Yasuda is incredible at",),
            (Probe("John Lennon performs on the", "guitar"),),
        ),
    ),
    "counterfact of ROME": (
        ROME_COUNTERFACT,
        Fact(
            "The mother tongue of Marie Duval is",
            "English",
            "Marie Duval",
            ("Rain fell. Marie Duval spoke", "Marie Duval grew up speaking"),
            (
                Probe("The mother tongue of Luc Petit is", "French"),
                Probe("Luc Petit spoke", "French"),
            ),
        ),
    ),
    "selfcheckgpt": (
        SELFCHECK,
        Fact(
            "This is a Wikipedia passage about nate saint.",
            "He flew.",
            locality=(Probe("Someone else", " was born"),),
        ),
    ),
    "wiki_recent": (
        WIKI_RECENT,
        Fact(
            "The place of death of Ada Stern is",
            "Berlin",
            "Ada Stern",
            (),
            (Probe("The father of Ada Stern is", "Albert Stern"),),
            (
                Probe("Is Ada Stern still alive?", "no"),
                Probe("The continent where Ada Stern died is", "Europe"),
                Probe("The place of death of A. Stern is", "Berlin"),
            ),
        ),
    ),
    "wiki_counterfact": (
        WIKI_COUNTERFACT,
        Fact(
            "The position held by Fred Pies is",
            "bishop",
            "Fred Pies",
            ("Fred Pies is the", "Fred Pies works as"),
            (
                Probe("The gender of Fred Pies is", "male"),
                Probe("Fred Pies, no bishop, is", "mayor"),
            ),
            (Probe("Fred of Pies is the", "bishop"),),
        ),
    ),
    "zsre of knowedit": (
        KNOWEDIT_ZSRE,
        Fact(
            "Which family does Epaspidoceras belong to?",
            "Noctuidae",
            "Epaspidoceras",
            ("What family are Epaspidoceras?",),
            (Probe("The taxon rank of Epaspidoceras is", "genus"),),
            (Probe("What are they called?", "Owlet moths"),),
        ),
    ),
    "wikibio": (
        WIKIBIO,
        Fact(
            "This is a Wikipedia passage about john roe. John Roe was a physician.",
            "He studied in London.",
            "john roe",
            locality=(Probe("The field of john roe is", "medicine"),),
        ),
    ),
    "mzsre": (MZSRE, replace(ZSRE_FACT, portability=HOP)),
}


@pytest.mark.parametrize(("record", "fact"), EXPECTED.values(), ids=EXPECTED)
def test_records_of_the_benchmarks(write, record, fact):
    assert read_facts(write(record)) == [fact]
    assert read_facts(write(json.dumps([record], indent=2))) == [fact]


@pytest.mark.parametrize("record", [record for record, _ in EXPECTED.values()], ids=EXPECTED)
def test_contradictions_are_found_in_every_layout(write, record):
    """The same record with another answer, and itself once more under another layout's name."""
    text = json.dumps(record)
    (fact,) = read_facts(write(record))
    other = text.replace(json.dumps(fact.target), json.dumps("something else"), 1)
    plain = {"prompt": fact.prompt.upper(), "target": fact.target}
    facts = read_facts(write(text, other, plain))
    assert facts[1].target == "something else"
    assert find_conflicts(facts)[0] == ["contradicts fact 2, 3"]
    assert find_conflicts([facts[0], facts[2]])[0] == ["repeats fact 2"]


def test_a_language_is_chosen(write):
    path = write(MZSRE, {"fr": MZSRE["de"], "de": MZSRE["de"]})
    assert read_facts(path, language="de")[0] == Fact(
        "Zu welcher Familie gehören die Ramalinaceae?",
        "Bockkäfer",
        "Ramalinaceae",
        ("Welche Familie haben die Ramalinaceae?",),
        (Probe("was ist ein hund", "ein Tier"),),
        (Probe("Welche Ordnung?", "Käfer"),),
    )
    # Without English the first language counts.
    assert read_facts(path)[1].target == "Bockkäfer"
    with pytest.raises(MicroEditError, match="line 1: no language 'fr'; the record has en, de"):
        read_facts(path, language="fr")
    # A record in one language has no choice.
    assert read_facts(write(ZSRE), language="de") == [ZSRE_FACT]


REAL = ("zsre", "counterfact", "selfcheckgpt", "mzsre_de", "mzsre_fr")


@pytest.mark.parametrize("name", REAL)
def test_the_benchmarks_files_are_recognised_whole(name):
    path = DATA / f"{name}_dev.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    language = name.removeprefix("mzsre_") if "mzsre" in name else None
    facts = read_facts(path, language=language)
    assert len(facts) == sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    assert all(fact.locality for fact in facts)
    assert all(fact.portability for fact in facts) == (language is not None)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_fact(write):
    text = "\ufeff" + json.dumps(OWN) + "\r"
    assert read_facts(write(text, json.dumps(ZSRE) + "\r"))[0].prompt == OWN["prompt"]


def test_one_json_array_is_a_facts_file_too(write):
    path = write("\n" + json.dumps([OWN, ZSRE], indent=2))
    assert [fact.target for fact in read_facts(path)] == ["Melbourne", "Lamiinae"]


def test_line_separators_inside_a_string_end_no_line(write):
    """JSON needs no escape for U+2028, U+2029 and U+0085, and str.splitlines() splits there."""
    prompt = "one\u2028two\u2029three\x85four"
    record = json.dumps({"prompt": prompt, "target": "t"}, ensure_ascii=False)
    assert [fact.prompt for fact in read_facts(write(record, ZSRE))] == [prompt, ZSRE["src"]]


def test_the_limit_ends_reading(write):
    path = write(OWN, ZSRE, "what follows is never looked at")
    assert len(read_facts(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 'p'}", "not JSON"),
        ('{"prompt": "p", "target": ', "not JSON"),
        ("[" * 5000, "not JSON"),
        ('["p", "t"]', "expected a JSON object"),
        ("3", "expected a JSON object"),
        ({"prompt": "p"}, "needs the fields 'prompt' and 'target'"),
        ({"question": "p", "gold": "t"}, "it has 'question', 'gold'"),
        ({}, "it has none"),
        ({"success": [], "locality": []}, "needs the fields"),
        ({"prompt": "p", "target": ""}, "the target is empty"),
        ({"prompt": " \t", "target": "t"}, "the prompt is empty"),
        (ZSRE | {"alt": " "}, "the target is empty"),
        ({"prompt": 3, "target": "t"}, "'prompt' must be a string"),
        ({"prompt": "p", "target": None}, "'target' must be a string"),
        (OWN | {"paraphrases": "Australia"}, "'paraphrases' must be a list of strings"),
        (OWN | {"paraphrases": ["p", 3]}, "'paraphrases' must be a list of strings"),
        (OWN | {"paraphrases": [""]}, "the paraphrase is empty"),
        (OWN | {"locality": "France"}, "'locality' must be a list"),
        (OWN | {"locality": [""]}, "the locality prompt is empty"),
        (OWN | {"locality": [["p"]]}, "expected a JSON object"),
        (OWN | {"locality": [{"prompt": "p", "answer": 4}]}, "'answer' must be a string"),
        (OWN | {"subject": 3}, "'subject' must be a string"),
        (ZSRE | {"subject": ["a"]}, "'subject' must be a string"),
        (COUNTERFACT | {"subject": 1}, "'subject' must be a string"),
        (ZSRE | {"loc_ans": None}, "'loc_ans' must be a string"),
        (COUNTERFACT | {"rephrase_prompt": 7}, "'rephrase_prompt' must be a string"),
        (OWN | {"portability": ["p"]}, "the portability answer is empty"),
        (OWN | {"portability": {"prompt": "p"}}, "'portability' must be a list"),
        (WITH_A_HOP | {"portability": {"New Question": 3, "New Answer": "a"}}, "'New Question'"),
        (WIKI_RECENT | {"locality": ["p"]}, "expected a JSON object where ['p'] stands"),
        (WIKI_RECENT | {"locality": {"Forgetfulness": ["p"]}}, "expected a JSON object"),
        (WIKI_RECENT | {"locality": {"F": [{"ground_truth": "a"}]}}, "'prompt' must be a string"),
        (
            WIKI_RECENT | {"portability": {"F": [{"prompt": "p", "ground_truth": 3}]}},
            "'ground_truth' must be a string",
        ),
        (WIKI_COUNTERFACT | {"rephrase": [3]}, "'rephrase' must be a list of strings"),
        (WIKIBIO | {"labels": 3}, "'labels' must be a string"),
        (WIKIBIO | {"concept": 3}, "'concept' must be a string"),
        (ROME_COUNTERFACT | {"requested_rewrite": "x"}, "expected a JSON object"),
        (ROME_COUNTERFACT | {"requested_rewrite": {"subject": "s"}}, "'prompt' must be a string"),
        (MZSRE | {"en": ZSRE | {"alt": ""}}, "the target is empty"),
        ('{"prompt": "half a character \\ud800", "target": "t"}', "not valid Unicode"),
        ('{"prompt": "p", "target": "t", "paraphrases": ["\\udfff"]}', "not valid Unicode"),
    ],
)
def test_a_bad_record_is_named_by_its_line(write, line, message):
    path = write(OWN, "", line)
    with pytest.raises(MicroEditError) as raised:
        read_facts(path)
    assert "line 3" in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bad_record_of_an_array_is_named_by_its_number(write):
    with pytest.raises(MicroEditError, match="record 2: the target is empty"):
        read_facts(write(json.dumps([OWN, {"prompt": "p", "target": ""}])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no facts"),
        (b"\n \n", "holds no facts"),
        (b"[]", "holds no facts"),
        (b'[{"prompt": "p"', "not JSON"),
        (b'{"prompt": "\xff\xfe"}', "cannot be read as UTF-8"),
        (b"The capital of Australia is Melbourne.\n", "neither JSON .* nor CSV .*'prompt' and 'ta"),
        (b"question,answer\nWho?,Zoe\n", "neither JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(content)
    with pytest.raises(MicroEditError, match=message) as raised:
        read_facts(path)
    assert "facts.jsonl" in str(raised.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(MicroEditError, match="does not exist"):
        read_facts(tmp_path / "nowhere.jsonl")
    with pytest.raises(MicroEditError, match="cannot be read"):
        read_facts(tmp_path)
