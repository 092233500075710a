"""Starting the app: a server for this machine only, that reports to nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from ssminterp.checkpoints import BUNDLED

# Tells the app which model it was started with.
MODEL_VARIABLE = "SSMINTERP_DASHBOARD_MODEL"
APP = Path(__file__).parent / "app.py"
HOST = "localhost"


def command(port: int) -> list[str]:
    """The command that serves the app. What must be safe is said here, where no file of a user comes after it."""
    options = {
        "server.address": HOST,
        "server.port": str(port),
        "server.headless": "true",
        "browser.gatherUsageStats": "false",
        "server.enableXsrfProtection": "true",
        "client.showErrorDetails": "none",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    # A page of another site whose name leads here (DNS rebinding) must not reach the app.
    flags += [f"--server.allowedHosts={host}" for host in (HOST, "127.0.0.1", "[::1]")]
    return [sys.executable, "-m", "ssminterp_dashboards.serve", *flags]


def environment(model: str) -> dict[str, str]:
    """What the app is told: the model to start with, which is the only folder that it may open."""
    name = (
        model if model in BUNDLED or not Path(model).expanduser().is_dir() else str(Path(model).expanduser().resolve())
    )
    # One core is left to the pages, so that they answer while the model runs.
    threads = str(max(1, (os.cpu_count() or 2) - 1))
    return {"OMP_NUM_THREADS": threads, **os.environ, MODEL_VARIABLE: name}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def launch(model: str, port: int) -> int:
    """Serve the app until it is interrupted. Returns its exit status."""
    port = port or free_port()
    print(f"ssminterp's dashboards: http://{HOST}:{port} (stop them with Ctrl+C)", flush=True)
    server = subprocess.Popen(command(port), env=environment(model))
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        return server.wait()
