"""Pictures of every page of the dashboards, light and dark, for the README and for looking at.

    python docs/screenshots.py [page …]

Needs chromium and playwright (`make setup`). Writes docs/images/dashboard_<page>_<light|dark>.png.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ssminterp_dashboards.browser import chart, launch_browser, serving, settle

IMAGES = Path(__file__).parent / "images"
SIZE = {"width": 1280, "height": 1000}


def run_sweep(page: Page) -> None:
    """The map and its strongest cell."""
    page.get_by_role("button", name="Run").click()
    chart(page, "map")
    chart(page, "tokens")


# What each page is opened with, and what is done there first.
PAGES: dict[str, tuple[str, Callable[[Page], None] | None]] = {
    "prompt": ("", None),
    "state": ("", None),
    "patch": ("?hooks=state,x,delta", run_sweep),
    "flow": ("", None),
    "memory": ("", None),
    "learn": ("", None),
}


def take(page: Page, address: str, name: str, scheme: str) -> Path:
    """One picture of one page."""
    query, first = PAGES[name]
    page.goto(f"{address}/{'' if name == 'prompt' else name}{query}")
    settle(page)
    if first is not None:
        first(page)
    settle(page)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)
    path = IMAGES / f"dashboard_{name}_{scheme}.png"
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)
    return path


def main(names: list[str]) -> None:
    with serving() as address, sync_playwright() as started:
        browser = launch_browser(started)
        for scheme in ("light", "dark"):
            page = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()  # type: ignore[arg-type]
            for name in names or PAGES:
                path = take(page, address, name, scheme)
                print(f"{path} {path.stat().st_size / 1000:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
