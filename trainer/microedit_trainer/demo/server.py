"""A `vllm serve` process on a free loopback port, for demo, tests and benchmarks."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from microedit_vllm.errors import MicroEditError

HOST = "127.0.0.1"
LAST_LINES = 25
ENGINE_PATIENCE = 10.0
# Without a size the CPU engine asks for nearly all memory and starts beside nothing else.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class VllmServer:
    """`vllm serve MODEL …` as a context manager: healthy inside the block, gone behind it.

    Args:
        model: what to serve, a folder or a hub id.
        arguments: further command-line arguments, e.g. ["--microedit", "demo/edits"].
        log: file that takes the server's output; overwritten.
        environment: on top of `ENVIRONMENT` and this process's own, which wins over
            `ENVIRONMENT`.
        startup_seconds: how long to wait for /health.

    Attributes:
        base_url: http://127.0.0.1:PORT, without /v1.
        log: the log file.
    """

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        startup_seconds: float = 600,
    ) -> None:
        self.model = str(model)
        self.arguments = list(arguments)
        self.log = log
        self.startup_seconds = startup_seconds
        self.environment = {**ENVIRONMENT, **os.environ, **(environment or {})}
        self.port = _free_port()
        self.base_url = f"http://{HOST}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "VllmServer":
        """Start the process and return once /health answers.

        Raises:
            MicroEditError: the process ended, or was not healthy in time; carries the last
                lines of its log.
        """
        command = [
            *vllm_command(),
            *("serve", self.model, "--host", HOST, "--port", str(self.port)),
            *self.arguments,
        ]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            # Its own session, so that stop() reaches the engine's processes too.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, patience: float = 20) -> None:
        """End the server and every process that it started; harmless when it never started."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGTERM)
        # Engine processes outlive their parent for a moment, to free their shared memory, and for
        # good when one hangs.
        deadline = time.monotonic() + ENGINE_PATIENCE
        while _signal_group(process.pid, 0) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.05)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()

    def log_text(self) -> str:
        """Everything that the server has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def last_lines(self) -> str:
        """The end of the log, for a message."""
        return "\n".join(self.log_text().splitlines()[-LAST_LINES:])

    def __enter__(self) -> "VllmServer":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.startup_seconds
        assert self._process is not None
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise MicroEditError(
                    f"vllm serve ended with status {status} before it was healthy; "
                    f"its last lines:\n{self.last_lines()}"
                )
            if _answers(f"{self.base_url}/health"):
                return
            time.sleep(0.5)
        raise MicroEditError(
            f"vllm serve was not healthy after {self.startup_seconds:.0f} s; "
            f"its last lines:\n{self.last_lines()}"
        )


def vllm_command() -> list[str]:
    """The `vllm` command beside this interpreter, else the one on PATH.

    Raises:
        MicroEditError: vLLM is not installed.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise MicroEditError("the command `vllm` is not installed; run `make install`")
    return [found]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    # No proxy: the machine's own settings may send even loopback through one.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _signal_group(group: int, number: int) -> bool:
    """Whether the process group was still there; 0 only asks."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
