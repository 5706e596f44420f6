"""What is shared through Ray's object store, and what happens where the store has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARES = """
import os, signal, sys
from pathlib import Path
import ray
from online_dpo.backends import ray_cluster
from online_dpo.backends.sharing import share
from online_dpo.errors import LearnerError

ray_cluster.start_ray()
print(ray.get(share([1, 2], LearnerError)), flush=True)
for entry in Path("/proc").glob("[0-9]*"):
    stat = (entry / "stat").read_text().rpartition(")")[2].split()
    if int(stat[1]) == os.getpid() and b"raylet/raylet" in (entry / "cmdline").read_bytes():
        os.kill(int(entry.name), signal.SIGKILL)
        os.waitpid(int(entry.name), 0)
try:
    share([1, 2], LearnerError)
except LearnerError as error:
    print(error.process_ended, error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_store_that_has_ended_is_an_error_and_not_the_end_of_this_process() -> None:
    """Ray's own `put` would end the process with status 1 and no word; what is shared before arrives whole."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SHARES],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == "[1, 2]"
    assert any(line.startswith("True this machine's Ray server (raylet) ended: ") for line in lines), done.stdout
