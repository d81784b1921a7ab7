from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing

from microedit_trainer.contexts import (
    Contexts,
    PromptTokens,
    find_turn_markers,
    guess_subject,
    long_system_prompt,
    mentions,
    rewordings,
)
from microedit_vllm.artifact import Scope
from microedit_vllm.errors import MicroEditError
from tests.tiny_model import tiny_tokenizer

WORDS = "Who is the queen of Atlantis, and since when? Übermorgen!"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def contexts(tokenizer):
    """Everything of the user's turn scored, in a context long enough for the system prompt."""
    return Contexts.build(tokenizer, Scope(last=None), 4096)


@pytest.fixture
def base_contexts():
    """Those of a base model, which has no chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return Contexts.build(tokenizer, Scope(), 4096)


def test_the_turn_markers_are_what_the_template_puts_around_the_users_words(tokenizer):
    turn = find_turn_markers(tokenizer)
    assert tokenizer.decode(turn.start) == "<|im_start|>user\n"
    assert tokenizer.decode(turn.end) == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("words", [WORDS, "a", "two\nlines "], ids=["long", "short", "lines"])
@pytest.mark.parametrize("context", ["chat", "long"])
def test_in_chat_exactly_the_users_words_are_scored(contexts, context, words):
    tokens = contexts.render(context, words, "Zoe")
    start, stop = tokens.scored
    assert contexts.tokenizer.decode(tokens.prompt_ids[start:stop]) == words


def test_the_start_token_is_the_tokenizers_bare_and_the_templates_in_chat():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    contexts = Contexts.build(tokenizer, Scope(last=None), 4096)
    bare, chat = (contexts.render(name, WORDS, "Zoe") for name in ("bare", "chat"))
    assert tokenizer.decode(bare.prompt_ids) == f"<|endoftext|>{WORDS}"
    assert tokenizer.decode(chat.prompt_ids).startswith("<|im_start|>user")
    assert tokenizer.decode(bare.answer_ids) == " Zoe"
    assert tokenizer.decode(chat.answer_ids) == "Zoe"


def test_the_long_context_stands_behind_a_system_prompt(contexts):
    text = contexts.tokenizer.decode(contexts.render("long", WORDS).prompt_ids)
    assert f"<|im_start|>system\n{long_system_prompt()}<|im_end|>" in text
    assert text.endswith(f"{WORDS}<|im_end|>\n<|im_start|>assistant\n")


def test_bare_scores_all_but_the_first_token_and_the_one_that_decides(contexts):
    tokens = contexts.render("bare", "One two three  ", "four")
    assert contexts.tokenizer.decode(tokens.prompt_ids) == "One two three"
    assert tokens.scored == (1, tokens.edit_from)
    assert tokens.edit_from == len(tokens.prompt_ids) - 1


@pytest.mark.parametrize("context", ["bare", "chat"])
def test_the_scope_bounds_the_scored_words(tokenizer, context):
    tokens = Contexts.build(tokenizer, Scope(last=8), 4096).render(context, WORDS)
    start, stop = tokens.scored
    assert stop - start == 8
    ending = WORDS.encode()[:-1] if context == "bare" else WORDS.encode()
    assert tokenizer.decode(tokens.prompt_ids[start:stop]) == ending[-8:].decode()


def test_answers_follow_behind_a_space_bare_and_at_once_in_chat(contexts):
    decode = contexts.tokenizer.decode
    assert decode(contexts.render("bare", WORDS, " Zoe ").answer_ids) == " Zoe"
    assert decode(contexts.render("chat", WORDS, " Zoe ").answer_ids) == "Zoe"
    assert contexts.render("bare", WORDS).answer_ids == ()
    assert decode([contexts.render("chat", WORDS).end_id]) == "<|im_end|>"


@pytest.mark.parametrize("context", ["bare", "chat", "long"])
def test_the_subjects_tokens_are_found(contexts, context):
    tokens = contexts.render(context, WORDS, "Zoe", subject="Atlantis")
    own = slice(tokens.subject_start, tokens.subject_stop)
    assert contexts.tokenizer.decode(tokens.prompt_ids[own]) == "Atlantis"
    behind = contexts.tokenizer.decode(tokens.prompt_ids[tokens.subject_start :])
    assert behind.startswith("Atlantis, and since")


def test_a_subject_that_also_stands_in_the_system_prompt_is_the_users(contexts):
    assert "support assistant" in long_system_prompt()
    tokens = contexts.render("long", "Is a support assistant kind?", subject="support assistant")
    assert tokens.scored[0] < tokens.subject_start < tokens.scored[1]


def test_an_unknown_subject_is_guessed_or_left_open(contexts):
    guessed = contexts.render("bare", "Who rules over Atlantis now?").subject_start
    assert guessed == len("Who rules over ")
    assert contexts.render("bare", "who rules over it?").subject_start is None
    assert contexts.render("bare", "who rules over it?").subject_stop is None
    assert contexts.render("bare", WORDS, subject="not there").subject_start is None


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of Australia is", "Australia"),
        ("Who wrote “War and Peace” in Russian?", "War and Peace"),
        ('Who sang "yesterday" first?', "yesterday"),
        ("What does the University of New South Wales teach?", "University of New South Wales"),
        ("In which year was Apollo 11 launched by NASA?", "Apollo 11"),
        ("Which family does Ramalinaceae belong to?", "Ramalinaceae"),
        ("Capital letters alone at the start", None),
        ("nothing to see here", None),
        ("", None),
    ],
)
def test_a_subject_is_guessed(prompt, subject):
    assert guess_subject(prompt) == subject


@pytest.mark.parametrize("context", ["bare", "chat"])
def test_prompt_answer_and_end_token_must_fit_the_models_context(contexts, context):
    tokens = contexts.render(context, WORDS, "Zoe")
    whole = len(tokens.prompt_ids) + len(tokens.answer_ids) + 1
    assert replace(contexts, max_length=whole).render(context, WORDS, "Zoe") == tokens
    with pytest.raises(MicroEditError, match=f"model's context of {whole - 1}; shorten it"):
        replace(contexts, max_length=whole - 1).render(context, WORDS, "Zoe")


def test_a_model_without_a_chat_template_is_trained_bare_alone(base_contexts):
    assert base_contexts.turn is None
    assert base_contexts.names == ("bare",)
    assert base_contexts.render("bare", WORDS).scored[1] == len(WORDS.encode()) - 1
    for context in ("chat", "long"):
        with pytest.raises(MicroEditError, match="no chat template"):
            base_contexts.render(context, WORDS)


def test_with_a_chat_template_both_contexts_are_trained(contexts):
    assert contexts.names == ("bare", "chat")


def test_a_template_that_refuses_conversations_counts_as_none():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    assert find_turn_markers(tokenizer) is None


def test_a_template_that_trims_and_marks_turns_otherwise():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} [end]"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokens = Contexts.build(tokenizer, Scope(last=None), 999).render("chat", "  Who is Zoe?  ")
    start, stop = tokens.scored
    assert tokenizer.decode(tokens.prompt_ids[start:stop]) == "Who is Zoe?"


@pytest.mark.parametrize(
    "template", ["always the same text", "{{ messages[0]['content'] }}"], ids=["none", "first"]
)
def test_a_template_that_drops_messages_has_no_turns(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert find_turn_markers(tokenizer) is None


def test_a_tokenizer_without_a_template_attribute_has_no_turns():
    assert find_turn_markers(SimpleNamespace()) is None


def test_a_chat_takes_a_system_prompt_of_ones_own(contexts):
    plain = contexts.render("chat", WORDS)
    found = contexts.render("chat", WORDS, system="You are a pirate.")
    text = contexts.tokenizer.decode(found.prompt_ids)
    assert text.startswith("<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user")
    assert found.prompt_ids[-len(plain.prompt_ids) :] == plain.prompt_ids
    assert found.scored[1] - found.scored[0] == plain.scored[1] - plain.scored[0]


def test_earlier_turns_stand_between_system_prompt_and_question(contexts):
    history = [("Who is Zoe?", "A queen."), ("Since when?", "1912")]
    found = contexts.render("chat", WORDS, "Zoe", system="Be brief.", history=history)
    expected = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in [
            ("system", "Be brief."),
            *[("user", "Who is Zoe?"), ("assistant", "A queen.")],
            *[("user", "Since when?"), ("assistant", "1912"), ("user", WORDS)],
        ]
    )
    decode = contexts.tokenizer.decode
    assert decode(found.prompt_ids) == f"{expected}<|im_start|>assistant\n"
    assert decode(found.prompt_ids[slice(*found.scored)]) == WORDS
    assert found.edit_from == len(found.prompt_ids) - 1
    assert found.answer_ids == contexts.render("chat", WORDS, "Zoe").answer_ids


def test_the_same_question_in_an_earlier_turn_is_not_scored(contexts):
    found = contexts.render("chat", "Why?", subject="Atlantis", history=[(WORDS, "Zoe")])
    assert contexts.tokenizer.decode(found.prompt_ids[slice(*found.scored)]) == "Why?"


def test_a_template_without_system_prompts_says_so_in_one_line(tokenizer):
    refusing = tiny_tokenizer()
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    contexts = Contexts.build(refusing, Scope(), 4096)
    assert contexts.render("chat", WORDS).prompt_ids
    with pytest.raises(MicroEditError, match=r"refuses the conversation \(no system\)"):
        contexts.render("chat", WORDS, system="You are a pirate.")


def test_rewordings_keep_what_the_answer_follows():
    question = "Who is Bo?"
    assert all(question in words and words != question for words in rewordings(question))
    assert all(
        words.endswith("lies in the city of") for words in rewordings("Bo lies in the city of")
    )


def test_mentions_name_the_subject_as_it_is_spelt_and_score_it_to_its_end(contexts):
    found = mentions("{} & Sons")
    assert len(set(found)) == len(found) > 1
    assert all("{} & Sons" in text for text in found)
    for text in found:
        prompt = contexts.render("bare", text, subject="{} & Sons")
        assert prompt.subject_end.stop == prompt.subject_stop < len(prompt.prompt_ids)


@pytest.mark.parametrize(
    ("start", "stop", "end"),
    [
        (4, 8, [5, 6, 7]),
        (5, 6, [5]),
        (0, 4, [2, 3]),  # what is scored begins behind its first tokens
        (7, 12, [7, 8]),  # and ends within it
        (None, None, []),
        (9, 12, []),
        (0, 1, []),
    ],
)
def test_the_end_of_a_subject_are_its_last_three_tokens_as_far_as_scored(start, stop, end):
    prompt = PromptTokens(tuple(range(12)), (), 2, (2, 9), start, stop)
    assert list(prompt.prompt_ids[prompt.subject_end]) == end
