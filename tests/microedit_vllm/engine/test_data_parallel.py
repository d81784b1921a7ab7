"""`vllm serve --data-parallel-size 2`: two engines, and two API servers in front of them."""

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from microedit_trainer.demo.server import VllmServer
from tests.microedit_vllm.engine.tiny_served import TinyServed, tiny_served

# Ten processes: `make soak` runs it.
pytestmark = pytest.mark.soak

NAME = "tiny"
ENGINES = 2
SERVE = [
    *("--enforce-eager", "--dtype", "float32", "--served-model-name", NAME),
    *("--max-model-len", "256", "--max-num-batched-tokens", "64"),
    *("--data-parallel-size", str(ENGINES)),
]
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> TinyServed:
    return tiny_served(tmp_path_factory.mktemp("served"))


@dataclass(frozen=True)
class Client:
    """Each request on a connection of its own, which either API server may take."""

    server: VllmServer

    def call(self, path: str, body: Any = None, **headers: str) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(self.server.base_url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def complete(self, prompt: list[int], engine: int) -> Any:
        body = {
            **{"model": NAME, "prompt": prompt, "max_tokens": 4, "temperature": 0},
            **{"ignore_eos": True, "return_token_ids": True},
        }
        header = {"X-data-parallel-rank": str(engine)}
        return self.call("/v1/completions", body, **header)


@pytest.fixture(scope="module")
def client(served, tmp_path_factory) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    arguments = [*SERVE, "--microedit", str(served.edit_set)]
    with VllmServer(served.model, arguments, log=log, environment=ENVIRONMENT) as running:
        yield Client(running)


def test_either_api_server_finds_the_decisions_of_either_engine(served, client):
    for prompt in (served.edited[0], served.unrelated[2]):
        expected = served.answer(prompt, 4)
        for engine in range(ENGINES):
            answer = client.complete(prompt, engine)
            assert tuple(answer["choices"][0]["token_ids"]) == expected.tokens
            for _ in range(8):
                found = client.call(f"/v1/microedit/requests/{answer['id']}")
                assert found["on"] is expected.on
                assert found["ard"] == pytest.approx(expected.ard, rel=1e-3)


def test_every_api_server_knows_the_set(served, client):
    for _ in range(8):
        assert client.call("/v1/microedit")["edit_set"] == served.edit_set.name


def test_one_line_tells_what_is_served(client):
    text = client.server.log_text()
    assert "ApiServer_1" in text
    assert text.count("microedit: ") == 1
