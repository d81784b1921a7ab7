from microedit_trainer.facts import Fact, find_conflicts, swap_subjects


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
        Fact("The capital of Peru is", "", "Peru"),
        Fact("Who invented the Chess?", "", "Chess"),
        Fact("Peru, oh Peru", "", "Peru"),
    ]


def test_no_prompt_is_swapped_to_an_edited_subject():
    facts = [Fact("Capital of Australia", "x", "Australia"), Fact("King of Peru", "x", "Peru")]
    swapped = swap_subjects(facts, ["PERU", "Chile"])
    assert [fact.prompt for fact in swapped] == ["Capital of Chile", "King of Chile"]
    assert swap_subjects(facts, ["Peru", "australia"]) == []
    assert swap_subjects(facts, []) == []
    assert swap_subjects([], ["Chile"]) == []


def test_two_encodings_of_an_accent_are_one_prompt():
    facts = [
        Fact("Qui a fondé Orléans\u00a0?", "Luc"),
        Fact("qui a fonde\u0301 Orle\u0301ans ?", "Ana"),
    ]
    assert find_conflicts(facts)[0] == ["contradicts fact 2"]
