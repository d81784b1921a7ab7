"""The installed command line, in a process of its own as a user runs it.

Long work belongs there: by the time it comes, a test process has been through vLLM engines, whose
threads are set for engines.
"""

import os
import subprocess
import sys
from pathlib import Path

MICROEDIT = Path(sys.executable).with_name("microedit")


def ended(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`microedit` with these words, when it has ended, however that was."""
    return subprocess.run(
        [MICROEDIT, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def microedit(*words: object) -> None:
    """Run `microedit` with these words; what it printed is shown where it failed."""
    result = ended(*words)
    assert not result.returncode, result.stdout + result.stderr
