"""The process around `vllm serve`, with a stand-in for the command itself."""

import os
import signal
import sys
import time
import urllib.request

import pytest

from microedit_trainer.demo import server as demo_server
from microedit_trainer.demo.server import VllmServer
from microedit_vllm.errors import MicroEditError

STAND_IN = """
import http.server, os, signal, subprocess, sys
behaviour = os.environ["BEHAVIOUR"]
print("started with", *sys.argv[1:], flush=True)
print("kv", os.environ["VLLM_CPU_KVCACHE_SPACE"], flush=True)
if behaviour == "fails":
    sys.exit("no such model")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if behaviour == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "never healthy":
    signal.pause()
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
try:
    http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
except KeyboardInterrupt:
    print("goodbye", flush=True)
"""


@pytest.fixture
def vllm_stand_in(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(demo_server, "vllm_command", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(demo_server, "ENGINE_PATIENCE", 0.2)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def make(tmp_path, behaviour, **options):
    return VllmServer(
        "the/model",
        ["--microedit", "a set"],
        log=tmp_path / "logs" / "server.log",
        environment={"BEHAVIOUR": behaviour},
        **options,
    )


def child_of(server):
    (line,) = [line for line in server.log_text().splitlines() if line.startswith("child ")]
    return int(line.split()[1])


def is_alive(process):
    """A killed orphan may stay a zombie where nobody reaps it."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(process):
    for _ in range(100):
        if not is_alive(process):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.usefixtures("vllm_stand_in")
def test_it_is_healthy_inside_the_block_and_gone_behind_it(tmp_path):
    with make(tmp_path, "serves") as server:
        with urllib.request.urlopen(f"{server.base_url}/health") as response:
            assert response.status == 200
        child = child_of(server)
        assert is_alive(child)
    assert wait_until_gone(child)
    log = server.log_text()
    assert f"serve the/model --host 127.0.0.1 --port {server.port} --microedit a set" in log
    assert "kv 1" in log
    assert "goodbye" in log  # it was asked to end, not killed


@pytest.mark.usefixtures("vllm_stand_in")
def test_a_server_that_will_not_end_is_killed_with_its_children(tmp_path):
    server = make(tmp_path, "stubborn").start()
    child = child_of(server)
    server.stop(patience=0.2)
    assert wait_until_gone(child)
    server.stop()  # harmless


@pytest.mark.usefixtures("vllm_stand_in")
def test_a_failed_start_carries_the_last_lines(tmp_path):
    with pytest.raises(MicroEditError, match="status 1 before it was healthy") as caught:
        make(tmp_path, "fails").start()
    assert "no such model" in str(caught.value)


@pytest.mark.usefixtures("vllm_stand_in")
def test_a_start_that_takes_too_long_is_ended(tmp_path):
    server = make(tmp_path, "never healthy", startup_seconds=1.5)
    with pytest.raises(MicroEditError, match="not healthy after 2 s"):
        server.start()
    assert wait_until_gone(child_of(server))


@pytest.mark.usefixtures("vllm_stand_in")
def test_ctrl_c_while_it_starts_leaves_no_process(tmp_path):
    server = make(tmp_path, "never healthy")
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            server.start()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert wait_until_gone(child_of(server))


def test_the_users_own_environment_wins_over_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert make(tmp_path, "serves").environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
