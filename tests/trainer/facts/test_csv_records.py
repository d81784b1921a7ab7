import csv

import pytest

from microedit_trainer.facts import Fact, Probe, find_conflicts, read_facts
from microedit_vllm.errors import MicroEditError

HEADER = "prompt,target,subject,paraphrases"


def test_a_row_is_a_fact(write):
    path = write(
        "Prompt, target ,subject,paraphrase,paraphrase_2,paraphrases,note",
        '"Who is ""Al"", then?",Zoe,Al,In short,,In words,ignored',
        "",
        ",,,,,,",
        'The king is,"Cy, the first",,,,,',
        name="facts.txt",
    )
    assert read_facts(path) == [
        Fact('Who is "Al", then?', "Zoe", "Al", ("In short", "In words")),
        Fact("The king is", "Cy, the first"),
    ]


def test_locality_and_portability_find_their_answers(write):
    header = "prompt,target,locality,locality_2,locality_answer_2,portability,portability_answer"
    path = write(header, "p,t,Bears eat,Two and two is,four,Then,so", "p,t,,,,,")
    facts = read_facts(path)
    assert facts[0].locality == (Probe("Bears eat", ""), Probe("Two and two is", "four"))
    assert facts[0].portability == (Probe("Then", "so"),)
    assert facts[1] == Fact("p", "t")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["facts.csv", "facts.jsonl", "facts.tsv"])
def test_the_delimiter_is_told_from_the_header_not_the_name(tmp_path, delimiter, name):
    """Cells hold the other delimiters, and the standard library writes the file."""
    rows = [("prompt", "target", "subject"), ("Is it a, b; or\tc?", "a;b,c\td", "it")]
    with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as handle:
        csv.writer(handle, delimiter=delimiter).writerows(rows)
    assert read_facts(tmp_path / name) == [Fact(*rows[1])]


def test_other_delimiters_are_not_guessed(write):
    with pytest.raises(MicroEditError, match="neither JSON"):
        read_facts(write("prompt|target", "p|t"))


def test_columns_of_a_known_data_set_are_read_as_such(write):
    path = write("src,alt,rephrase,loc,loc_ans,subject", "Who?,Al,What?,nq,yes,", "Why?,Bo,,,,it")
    assert read_facts(path) == [
        Fact("Who?", "Al", None, ("What?",), (Probe("nq", "yes"),)),
        Fact("Why?", "Bo", "it"),
    ]


def test_contradictions_and_repetitions_are_found(write):
    facts = read_facts(write("prompt;target", "Who is it?;Al", "who  is it?;Bo", "x y;z", "x y;Z"))
    assert find_conflicts(facts) == {
        0: ["contradicts fact 2"],
        1: ["contradicts fact 1"],
        2: ["repeats fact 4"],
        3: ["repeats fact 3"],
    }


def test_the_limit_ends_reading(write):
    assert len(read_facts(write("prompt,target", "a,b", "a,b,too,many"), limit=1)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("p", "line 5: 1 cells, but the header names 4 columns"),
        ("p,t,s,one,two", "line 5: 5 cells, but the header names 4 columns"),
        (",t,,", "line 5: the prompt is empty"),
        ("p, ,,", "line 5: the target is empty"),
        ('"p"x,t,,', "line 5: not CSV"),
        ('"never closed,t,,', "line 5: not CSV"),
        ("p" * 200_000 + ",t,,", "line 5: not CSV"),
    ],
)
def test_a_bad_row_is_named_by_the_line_that_it_starts_on(write, row, message):
    path = write(HEADER, '"a prompt', 'of two lines",t,,', "", row, "q,t,,")
    with pytest.raises(MicroEditError) as raised:
        read_facts(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_column_named_twice_is_refused(write):
    with pytest.raises(MicroEditError, match="line 1: the column 'target' stands there 2 times"):
        read_facts(write("prompt,target,target", "p,t,u"))


def test_a_header_alone_holds_no_facts(write):
    with pytest.raises(MicroEditError, match="holds no facts"):
        read_facts(write("prompt,target"))
