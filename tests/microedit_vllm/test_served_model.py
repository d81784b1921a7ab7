"""Servers without edits, by a stand-in that knows vLLM's list of models and no route of ours.

Real MicroEdit servers are in `engine/test_server.py`.
"""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from microedit_vllm.errors import MicroEditError
from microedit_vllm.served_model import ServedModel
from microedit_vllm.verification import verify_server
from tests.builders import tiny_edit_set, tiny_sae


class PlainServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        body = {"object": "list", "data": [{"id": "plain", "object": "model"}] if known else []}
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PlainServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_the_first_model_is_taken_with_and_without_v1(url, tail):
    assert ServedModel.connect(url + tail).model == "plain"


def test_a_server_without_edits_is_said_to_be_one(url):
    with pytest.raises(MicroEditError, match="serves no edit set; start it with --microedit"):
        verify_server(ServedModel.connect(url), tiny_edit_set(tiny_sae()))


def test_an_unknown_request_has_no_decision(url):
    served = ServedModel.connect(url)
    assert served.find_decision("cmpl-1") is None
    with pytest.raises(MicroEditError, match="tells no decision for cmpl-1"):
        served.decision("cmpl-1")


def test_nobody_there():
    with pytest.raises(MicroEditError, match="no server with a model answers at"):
        ServedModel.connect("http://127.0.0.1:9")
