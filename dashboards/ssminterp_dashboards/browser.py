"""Driving the app in a real browser, for tests, benchmark and screenshots: a server on a free port, Debian's chromium.

It needs playwright, which is among the development extras, and no browser of playwright's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, Playwright, expect

from ssminterp_dashboards.launch import HOST, command, environment, free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
IDLE = '[data-testid="stApp"][data-test-script-state="notRunning"]'
# The machines that run this have two cores, which others share.
PATIENCE = 90_000


def why_not() -> str | None:
    """Why there is no browser to test with; None if there is one."""
    return None if Path(CHROMIUM).exists() else f"no browser: there is no {CHROMIUM} (apt-get install chromium)"


def launch_browser(playwright: Playwright) -> Browser:
    """Debian's chromium, without a window."""
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
    expect.set_options(timeout=PATIENCE)
    return browser


@contextmanager
def serving(model: str = "tiny-mamba") -> Iterator[str]:
    """The address of an app that runs until the context ends."""
    port = free_port()
    env = environment(model) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    server = subprocess.Popen(command(port), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_answer(f"http://{HOST}:{port}/_stcore/health", server)
        yield f"http://{HOST}:{port}"
    finally:
        server.terminate()
        server.wait(20)


def wait_for_answer(address: str, server: subprocess.Popen[bytes], seconds: float = 90) -> None:
    """Wait until the server answers. Raises RuntimeError if it ends or does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{address} did not answer in {seconds} s")


def settle(page: Page) -> Page:
    """The page once the script has run and the figures are drawn."""
    page.wait_for_selector(IDLE, timeout=PATIENCE)
    page.wait_for_timeout(250)
    page.wait_for_selector(IDLE, timeout=PATIENCE)
    return page


def chart(page: Page, key: str) -> Locator:
    """The figure of this key, drawn."""
    found = page.locator(f".st-key-{key} .js-plotly-plot").first
    found.locator(".main-svg").first.wait_for(timeout=PATIENCE)
    return found


def point_at_cell(page: Page, key: str, row: int, column: int) -> None:
    """Move the mouse to the middle of a cell of a heat map, rows and columns counted as the axes count them."""
    plot = chart(page, key)
    plot.scroll_into_view_if_needed()
    place = plot.evaluate(
        """(plot, [row, column]) => {
            const {xaxis, yaxis} = plot._fullLayout;
            return [xaxis._offset + xaxis.r2p(column), yaxis._offset + yaxis.r2p(row)];
        }""",
        [row, column],
    )
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    page.wait_for_timeout(150)


def click_cell(page: Page, key: str, row: int, column: int) -> None:
    """Click the middle of a cell of a heat map."""
    point_at_cell(page, key, row, column)
    page.mouse.down()
    page.mouse.up()
