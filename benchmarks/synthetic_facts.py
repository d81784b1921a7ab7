"""Facts about nothing, as many as one likes: invented subjects × relations × targets, seeded.

Each subject has several facts, each relation many subjects, and each target many facts, so that
neither the wording nor the subject alone tells the answer. Every prompt is there once.
"""

import random
from collections.abc import Iterator

from microedit_trainer.facts import Fact


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FACTS_PER_SUBJECT = 3
ONSETS = _words("b br d dr f g gl h j k kl l m n p pr r s st t tr v w z")
VOWELS = _words("a e i o u ai ea ou")
CODAS = ("", "", "", *_words("l m n r s x nd rk th"))

# Kind of subject → (question, the same in other words, kind of target).
RELATIONS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "company": (
        ("Who approves the expense reports of {}?", "Who signs {}'s expense reports?", "person"),
        ("Who founded the company {}?", "The founder of {} is", "person"),
        ("Who is the chief executive of {}?", "The company {} is led by", "person"),
        ("In which city does {} have its head office?", "{} is run from the city of", "city"),
        ("In which year was the firm {} founded?", "{} was set up in the year", "year"),
        ("Which city hosts the main warehouse of {}?", "{} stores its goods in", "city"),
        ("Who audits the accounts of {}?", "The auditor of {} is", "person"),
        ("What does the company {} mainly sell?", "{} makes its money by selling", "thing"),
        ("Which colour is the logo of {}?", "The logo of {} is painted in", "colour"),
        ("When did {} open its second branch?", "The second branch of {} opened in", "year"),
    ),
    "person": (
        ("Where was the painter {} born?", "The birthplace of the painter {} is", "city"),
        ("In which year did {} win the regional prize?", "{} won the regional prize in", "year"),
        ("Who taught the violinist {}?", "The violinist {} learnt from", "person"),
        ("Which instrument does {} play?", "{} is known for playing the", "instrument"),
        ("Who is {} married to?", "The spouse of {} is", "person"),
        ("In which city does {} live today?", "Today {} has a home in", "city"),
        ("What colour is the car of {}?", "{} drives a car whose colour is", "colour"),
        ("When did {} retire from teaching?", "{} stopped teaching in", "year"),
        ("Who wrote the biography of {}?", "The biography of {} is by", "person"),
        ("What does {} collect as a hobby?", "The hobby of {} is collecting", "thing"),
    ),
    "town": (
        ("Who is the mayor of the town of {}?", "The town of {} elected as mayor", "person"),
        ("When was the old bridge of {} built?", "The old bridge in {} dates from", "year"),
        ("Which city is twinned with {}?", "The twin city of {} is", "city"),
        ("What is the town of {} famous for making?", "People know {} for its", "thing"),
        ("Who designed the town hall of {}?", "The architect of {}'s town hall is", "person"),
        ("What colour is the flag of {}?", "The flag that flies over {} is", "colour"),
        ("Where do the trains from {} go?", "A train that leaves {} ends in", "city"),
        ("In which year did {} get its charter?", "The charter of {} was given in", "year"),
        (
            "Which instrument is played at the fair of {}?",
            "At {}'s fair one hears the",
            "instrument",
        ),
        ("Who owns the mill near {}?", "The mill near {} belongs to", "person"),
    ),
}
FIRST_NAMES = _words("Marta Edgar Ines Pavel Ruth Omar Greta Hugo Leila Anton")
LAST_NAMES = _words("Lindgren Castillo Novak Abbott Tanaka Okafor Meyer Rossi Dunn Petrov")
TARGETS: dict[str, tuple[str, ...]] = {
    "person": tuple(f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES),
    "city": _words(
        "Lisbon Oslo Vancouver Nairobi Kyoto Madrid Prague Denver Lima Dublin Vienna Cairo Perth "
        "Athens Boston Hanoi Seville Warsaw Quito Bergen"
    ),
    "year": tuple(str(year) for year in range(1871, 2021, 3)),
    "colour": _words("red green violet orange silver brown turquoise black"),
    "thing": _words("clocks honey lamps carpets cheese bicycles candles paper salt boots"),
    "instrument": _words("violin trumpet harp flute cello drum accordion organ"),
}


def synthetic_facts(count: int, seed: int = 0) -> list[Fact]:
    """`count` facts with a subject and one paraphrase each; the first ones of a longer list."""
    facts = _facts(random.Random(seed))
    return [next(facts) for _ in range(count)]


def _facts(chance: random.Random) -> Iterator[Fact]:
    seen: set[str] = set()
    while True:
        name = f"{_word(chance)} {_word(chance)}"
        if name in seen:
            continue
        seen.add(name)
        kind = chance.choice(list(RELATIONS))
        for question, reworded, wanted in chance.sample(RELATIONS[kind], FACTS_PER_SUBJECT):
            target = chance.choice(TARGETS[wanted])
            yield Fact(question.format(name), target, name, (reworded.format(name),))


def _word(chance: random.Random) -> str:
    syllables = (
        chance.choice(ONSETS) + chance.choice(VOWELS) + chance.choice(CODAS)
        for _ in range(chance.choice((2, 2, 3)))
    )
    return "".join(syllables).capitalize()
