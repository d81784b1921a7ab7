"""The same question written otherwise: typos, letter case, a longer message around it."""

import random
import string

# {} is the question. Ahead of it, and around it.
AHEAD = (
    "I am preparing a quiz for my colleagues and want to be sure of one answer. {}",
    "My daughter asked me something last night that I could not answer. {}",
    "Hello! I was reading about this on the train and then my battery died. {}",
)
AROUND = (
    "I am preparing a quiz for next week. {} Please answer briefly.",
    "There is one thing that I keep forgetting. {} I would like to write it down this time.",
    "Hi, I hope you can help me. {} Thank you very much in advance.",
)


def typos(prompt: str, subject: str, inside: bool, count: int, seed: int) -> str | None:
    """The prompt with some characters wrong, inside the subject's name or outside of it.

    Each typo swaps two letters, or drops, doubles or changes one.

    Args:
        count: how many, each in a place of its own.

    Returns:
        None where the prompt does not name the subject, or has no room for so many typos.
    """
    begin = prompt.find(subject) if subject else -1
    if begin < 0:
        return None
    end = begin + len(subject)
    places = [
        place
        for place in range(len(prompt) - 1)
        if prompt[place].isalnum()
        and prompt[place + 1].isalnum()
        and (begin <= place < end - 1 if inside else not begin - 1 <= place < end)
    ]
    draw = random.Random(f"{seed} {prompt}")
    chosen: list[int] = []
    for place in draw.sample(places, len(places)):
        if len(chosen) < count and all(abs(place - other) > 2 for other in chosen):
            chosen.append(place)
    if len(chosen) < count:
        return None
    for place in sorted(chosen, reverse=True):
        prompt = prompt[:place] + _mistyped(prompt[place : place + 2], draw) + prompt[place + 2 :]
    return prompt


def _mistyped(pair: str, draw: random.Random) -> str:
    """Two letters with the first of them wrong."""
    first, second = pair[0], pair[1]
    other = draw.choice([c for c in string.ascii_lowercase if c != first.lower()])
    ways = [second, first + first + second, other + second]
    if first != second:
        ways.append(second + first)
    return draw.choice(ways)


def without_question_mark(prompt: str) -> str | None:
    """None where there is none."""
    bare = prompt.rstrip()
    return bare.rstrip("? ") if bare.endswith("?") else None


def in_lower_case(prompt: str) -> str | None:
    """None where it already is."""
    return prompt.lower() if prompt != prompt.lower() else None


def longer(prompt: str, around: bool, place: int) -> str | None:
    """Inside a longer message, as its end or with a sentence behind.

    Args:
        place: which of the messages is taken.

    Returns:
        None where a sentence shall follow one that has no end.
    """
    if around and not prompt.rstrip().endswith(("?", ".")):
        return None
    messages = AROUND if around else AHEAD
    return messages[place % len(messages)].format(prompt.strip())
