"""The installed command line, in a process of its own as a user runs it.

Long work belongs there: by the time it comes, a test process has been through vLLM engines, whose
threads are set for engines.
"""

import subprocess
import sys
from pathlib import Path

MICROEDIT = Path(sys.executable).with_name("microedit")


def microedit(*words: object) -> None:
    """Run `microedit` with these words; what it printed is shown where it failed."""
    command = [MICROEDIT, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not ended.returncode, ended.stdout + ended.stderr
