"""`vllm serve MODEL --microedit SET`: the flags, the routes, and starts that must fail."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from microedit_trainer.demo.server import VllmServer
from microedit_vllm.cli.main import main
from tests.microedit_vllm.engine.synthetic import EDITED, ENGINE_ARGS, UNRELATED, change_manifest

NAME = "edited"
SERVE = [
    *("--enforce-eager", "--served-model-name", NAME, "--max-num-seqs", "8"),
    *("--max-model-len", str(ENGINE_ARGS["max_model_len"])),
]


@pytest.fixture(scope="module")
def server(smollm2, edit_set, tmp_path_factory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    arguments = [*SERVE, "--microedit", str(edit_set), "--api-key", "secret"]
    with VllmServer(smollm2, arguments, log=log) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="secret", max_retries=0)


def get(server: VllmServer, path: str, key: str = "secret") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server.base_url}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    body = {"vllm_xargs": options} if options else {}
    return client.completions.create(
        model=NAME, prompt=prompt, max_tokens=6, temperature=0, extra_body=body
    )


def test_one_line_tells_what_is_served(server):
    lines = [line for line in server.log_text().splitlines() if "microedit: " in line]
    assert len(lines) == 1
    for part in (
        "set",
        "facts 2",
        "layer 20",
        "k 16",
        "relative",
        "tau 0.6",
        "window:8 in last:64",
    ):
        assert part in lines[0]


def test_the_loaded_set_is_shown(server):
    status, body = get(server, "/v1/microedit")
    assert status == 200
    assert body == {
        "edit_set": "set",
        "facts": 2,
        "layer": 20,
        "k": 16,
        "decision": "relative",
        "tau": 0.6,
        "scope": "window:8 in last:64",
    }


def test_a_completion_s_decision_is_read_by_its_id(server, client):
    on, off = complete(client, EDITED[0]), complete(client, EDITED[0], microedit="off")
    assert on.choices[0].text != off.choices[0].text
    status, body = get(server, f"/v1/microedit/requests/{on.id}")
    assert status == 200
    assert body == {"id": on.id, "edit_set": "set", "ard": body["ard"], "tau": 0.6, "on": True}
    assert 0 < body["ard"] < 0.6
    _, body = get(server, f"/v1/microedit/requests/{off.id}")
    assert (body["ard"], body["on"]) == (None, False)


def test_a_streamed_answer_is_the_same_and_has_its_decision(server, client):
    whole = complete(client, EDITED[0]).choices[0].text
    stream = client.completions.create(
        model=NAME, prompt=EDITED[0], max_tokens=6, temperature=0, stream=True
    )
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts) == whole
    assert len(parts) > 1
    assert get(server, f"/v1/microedit/requests/{parts[0].id}")[1]["on"] is True


def test_each_prompt_of_a_completion_has_its_decision(server, client):
    both = complete(client, [EDITED[0], UNRELATED[0]])
    found = [get(server, f"/v1/microedit/requests/{both.id}{tail}")[1] for tail in ("", "-0", "-1")]
    assert [body["on"] for body in found] == [True, True, False]


def test_a_chat_answer_has_its_decision(server, client):
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": UNRELATED[1]}], max_tokens=4
    )
    status, body = get(server, f"/v1/microedit/requests/{answer.id}")
    assert status == 200
    assert body["on"] is False


def test_an_unknown_id_is_404_with_an_error(server):
    status, body = get(server, "/v1/microedit/requests/cmpl-unknown")
    assert status == 404
    assert "cmpl-unknown" in body["error"]["message"]


def verify(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *map(str, words)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_server_passes_its_self_check(server, edit_set, capsys):
    where = ("--url", f"{server.base_url}/v1", "--api-key", "secret")
    status, out, _ = verify(capsys, edit_set, *where, "--json")
    assert status == 0
    report = json.loads(out)
    assert report["findings"] == []
    assert [prompt["found"]["on"] for prompt in report["prompts"]] == [True] * 2 + [False] * 4


def test_a_finding_is_status_1(server, copied_set, capsys):
    path = copied_set / "golden_prompts.json"
    prompts = json.loads(path.read_text())
    for prompt in prompts:
        prompt["misread"]["layer_after"], prompt["ard"] = prompt["ard"], prompt["ard"] / 2
    path.write_text(json.dumps(prompts))
    where = ("--url", server.base_url, "--api-key", "secret")
    status, out, _ = verify(capsys, copied_set, *where)
    assert status == 1
    assert "layer_after: z is read one layer too late" in " ".join(out.split())


@pytest.mark.parametrize(
    ("key", "harm", "said"),
    [
        ("wrong", None, "no server with a model answers"),
        ("secret", {"solver": "joint", "facts": 3}, "another edit set (set: facts 2, not 3)"),
        ("secret", "token", "the server refuses a golden prompt"),
    ],
)
def test_what_cannot_be_verified_is_one_line_and_status_2(
    server, copied_set, capsys, key, harm, said
):
    if harm == "token":
        path = copied_set / "golden_prompts.json"
        first, *rest = json.loads(path.read_text())
        path.write_text(json.dumps([first | {"token_ids": [10**9], "edit_from": 0}, *rest]))
    elif harm:
        change_manifest(copied_set, **harm)
    status, out, err = verify(capsys, copied_set, "--url", server.base_url, "--api-key", key)
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("microedit: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", ["/v1/microedit", "/v1/microedit/requests/x"])
def test_the_routes_are_behind_the_api_key(server, path):
    assert get(server, path, key="wrong")[0] == 401


@pytest.mark.parametrize(
    "options",
    [
        {"microedit": "maybe"},
        {"microedit": 3},
        {"microedit_edit_from": -1},
        {"microedit_edit_from": 10_000},
        {"microedit_edit_from": "last"},
        {"microedit_unknown": 1},
    ],
)
def test_a_bad_option_is_400_and_the_server_lives_on(client, options):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, EDITED[0], **options)
    assert "vllm_xargs" in str(caught.value)
    assert complete(client, UNRELATED[0]).choices[0].text


def _bad_starts(smollm2: Path, folder: Path) -> Iterator[tuple[list[str], str]]:
    """Arguments of starts that must fail, and what their line must say.

    Yields after each harm done to the set in `folder`, which the next one adds to.
    """
    yield ["--microedit", "no/such/folder"], "no/such/folder is not a folder"
    yield ["--microedit-sae", "sae"], "--microedit-sae needs --microedit"
    serve = ["--microedit", str(folder)]
    yield [*serve, "--microedit-sae", str(smollm2)], "not an SAE folder"
    yield [*serve, "--hf-overrides.num_hidden_layers", "4"], "only 4 layers"
    change_manifest(folder, position="sequence")
    yield serve, "--no-enable-chunked-prefill --no-enable-prefix-caching"
    yield [*serve, "--no-enable-chunked-prefill"], "start with --no-enable-prefix-caching"
    manifest = json.loads((folder / "microedit.json").read_text())
    other = {**manifest["model"], "fingerprint": "0" * 64}
    change_manifest(folder, position="decision", model=other)
    yield serve, "was made for smollm2"
    golden = load_file(folder / "golden.safetensors")
    save_file({**golden, "dist": golden["dist"] * 2}, folder / "golden.safetensors")
    yield serve, "golden activations do not reproduce"
    with (folder / "edits.safetensors").open("r+b") as file:
        file.truncate(1000)
    yield serve, "is damaged"
    change_manifest(folder, version=99)
    yield serve, "format version 99"


def test_a_start_that_must_fail_ends_with_one_line(
    smollm2, copied_set, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    """`vllm serve`'s own command line, in this process: most of a start is importing vLLM."""
    from vllm.entrypoints.cli import main as vllm_cli

    for arguments, wanted in _bad_starts(smollm2, copied_set):
        command = ["vllm", "serve", str(smollm2), "--port", "0", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            vllm_cli.main()
        assert ended.value.code not in (0, None), arguments
        lines = capsys.readouterr().err.splitlines()
        ours = [line for line in lines if line.startswith("microedit: ")]
        assert len(ours) == 1, (arguments, lines)
        assert wanted in ours[0]


def test_a_failed_start_prints_no_traceback(smollm2, tmp_path):
    """The same as a process of its own."""
    command = [Path(sys.executable).with_name("vllm"), "serve", smollm2, "--microedit", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"microedit: {tmp_path} is not an edit set")
