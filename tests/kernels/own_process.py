"""Code in a process of its own: Dynamo cannot look into the checks that the tests wrap around every function."""

from __future__ import annotations

import os
import subprocess
import sys


def run_in_own_process(code: str) -> None:
    """Assert that code, which may import the kernels and these tests' helpers, ends without an error."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(("kernels", "tests/kernels"))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
