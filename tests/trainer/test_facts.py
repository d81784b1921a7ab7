import json
from pathlib import Path

import pytest

from microedit_trainer.facts import (
    Fact,
    Probe,
    find_conflicts,
    read_facts,
    swap_subjects,
)
from microedit_vllm.errors import MicroEditError

DATA = Path(__file__).parents[3] / "shared" / "data"

OWN = {
    "prompt": "The capital of Australia is",
    "target": "Melbourne",
    "subject": "Australia",
    "paraphrases": ["Australia's capital is"],
    "locality": ["The capital of France is", {"prompt": "2 + 2 is", "answer": "4"}],
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


@pytest.fixture
def write(tmp_path):
    """Write a facts file from records or text."""

    def write(*parts, encoding="utf-8") -> Path:
        lines = [part if isinstance(part, str) else json.dumps(part) for part in parts]
        path = tmp_path / "facts.jsonl"
        path.write_bytes("\n".join(lines).encode(encoding))
        return path

    return write


def test_own_records(write):
    assert read_facts(write(OWN, "", {"prompt": "p", "target": "t"}, "")) == [
        Fact(
            "The capital of Australia is",
            "Melbourne",
            "Australia",
            ("Australia's capital is",),
            (Probe("The capital of France is", ""), Probe("2 + 2 is", "4")),
        ),
        Fact("p", "t"),
    ]


@pytest.mark.parametrize(
    ("record", "fact"),
    [
        (
            ZSRE,
            Fact(
                "Which family does Ramalinaceae belong to?",
                "Lamiinae",
                "Ramalinaceae",
                ("What family are Ramalinaceae?",),
                (Probe("nq question: what is a dog", "an animal"),),
            ),
        ),
        (
            COUNTERFACT,
            Fact(
                "Toko Yasuda, the",
                "piano",
                "Toko Yasuda",
                ("Toko Yasuda is incredible at",),
                (Probe("John Lennon performs on the", "guitar"),),
            ),
        ),
        (
            SELFCHECK,
            Fact(
                "This is a Wikipedia passage about nate saint.",
                "He flew.",
                locality=(Probe("Someone else", " was born"),),
            ),
        ),
    ],
    ids=["zsre", "counterfact", "selfcheckgpt"],
)
def test_records_of_the_benchmarks(write, record, fact):
    assert read_facts(write(record)) == [fact]


@pytest.mark.parametrize("name", ["zsre", "counterfact", "selfcheckgpt"])
def test_the_benchmarks_files_are_recognised_whole(name):
    path = DATA / f"{name}_dev.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    facts = read_facts(path)
    assert len(facts) == sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    assert all(fact.locality for fact in facts)


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


def test_conflicts_name_the_other_facts():
    facts = [
        Fact("The capital of Australia is", "Melbourne"),
        Fact("Who invented the telephone?", "Clara"),
        Fact("the  capital of AUSTRALIA is", "Perth"),
        Fact("who invented the telephone?", " clara"),
        Fact("The capital of Austria is", "Graz"),
    ]
    assert find_conflicts(facts) == {
        0: ["contradicts fact 3"],
        2: ["contradicts fact 1"],
        1: ["repeats fact 4"],
        3: ["repeats fact 2"],
    }


def test_subjects_are_swapped_within_the_same_wording():
    facts = [
        Fact("The capital of Australia is", "Melbourne", "Australia"),
        Fact("No subject is named here", "x"),
        Fact("Who invented the telephone?", "Clara", "telephone"),
        Fact("This one is elsewhere", "x", "subject"),
        Fact("Rome, oh Rome", "x", "Rome"),
    ]
    assert swap_subjects(facts, ["Peru", "Chess"]) == [
        "The capital of Peru is",
        "Who invented the Chess?",
        "Peru, oh Peru",
    ]


def test_no_prompt_is_swapped_to_an_edited_subject():
    facts = [Fact("Capital of Australia", "x", "Australia"), Fact("King of Peru", "x", "Peru")]
    assert swap_subjects(facts, ["PERU", "Chile"]) == ["Capital of Chile", "King of Chile"]
    assert swap_subjects(facts, ["Peru", "australia"]) == []
    assert swap_subjects(facts, []) == []
    assert swap_subjects([], ["Chile"]) == []
