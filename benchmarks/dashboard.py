"""What a reader of the dashboards waits for, in a real browser, on the bundled tiny-mamba.

    python benchmarks/dashboard.py [repeats]

first page: from the server's first answer to a page whose figures are drawn. new prompt: from Enter to the new
figures. map: from Run to the layer × position map of IOI, one hook, 8 pairs. drill-down: from a click on a cell to
its tokens, channels and coordinates. Prints a table and writes results/dashboard.json. The first server compiles the
scans if this machine never has; it is started once before anything is timed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from playwright.sync_api import Browser, Page, sync_playwright

from ssminterp_dashboards.browser import chart, launch_browser, point_at_cell, serving, settle

REPEATS = 5
WANTED = {"first page": 5.0, "new prompt": 1.5, "map": 3.0, "drill-down": 1.0}
PROMPTS = ("Shelby", "Emma", "Jerry", "Rachel", "Molly")
DRAWN = "() => [...document.querySelectorAll('.js-plotly-plot')].every(plot => plot.querySelector('.main-svg'))"


def first_page(browser: Browser) -> float:
    """Seconds from the server's first answer to the first page with its figures."""
    with serving() as address:
        start = time.perf_counter()
        page = browser.new_page()
        page.goto(address)
        for key in ("predictions", "steps", "lens"):
            chart(page, key)
        seconds = time.perf_counter() - start
        page.close()
    return seconds


def new_prompt(page: Page, name: str) -> float:
    """Seconds from Enter to the views of another prompt."""
    box = page.get_by_label("Prompt", exact=True)
    box.fill(f"{name} gave an apple to")
    start = time.perf_counter()
    box.press("Enter")
    page.wait_for_function(
        "name => document.body.innerText.includes('5 tokens') && "
        "document.querySelector('.st-key-lens .xtick')?.textContent.includes(name)",
        arg=name,
    )
    page.wait_for_function(DRAWN)
    seconds = time.perf_counter() - start
    settle(page)
    return seconds


def sweep(page: Page, address: str, seed: int) -> float:
    """Seconds from Run to the map."""
    page.goto(f"{address}/patch?seed={seed}")
    settle(page)
    start = time.perf_counter()
    page.get_by_role("button", name="Run").click()
    chart(page, "map")
    seconds = time.perf_counter() - start
    chart(page, "channels")
    settle(page)
    return seconds


def drill_down(page: Page, layer: int, token: int) -> float:
    """Seconds from a click on a cell to its views. The caption of the last of them names the cell."""
    point_at_cell(page, "map", layer, token)
    start = time.perf_counter()
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function(
        "text => [...document.querySelectorAll('[data-testid=\"stCaptionContainer\"]')]"
        ".filter(c => c.innerText.includes(text)).length >= 3",
        arg=f"layer {layer} · position {token} ",
    )
    page.wait_for_function(DRAWN)
    seconds = time.perf_counter() - start
    settle(page)
    return seconds


def main(repeats: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in WANTED}
    with sync_playwright() as started:
        browser = launch_browser(started)
        first_page(browser)
        times["first page"] = [first_page(browser) for _ in range(repeats)]
        with serving() as address:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(address)
            settle(page)
            times["new prompt"] = [new_prompt(page, name) for name in PROMPTS[:repeats]]
            sweep(page, address, 99)
            times["map"] = [sweep(page, address, seed) for seed in range(repeats)]
            times["drill-down"] = [drill_down(page, layer, layer + 3) for layer in range(repeats)]
        browser.close()
    table = pd.DataFrame(
        {
            "view": name,
            "median s": statistics.median(values),
            "slowest s": max(values),
            "wanted s": WANTED[name],
        }
        for name, values in times.items()
    )
    print(table.to_string(index=False, float_format="{:.2f}".format))
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load at the end": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "streamlit", "plotly", "playwright")},
    }
    out = Path(__file__).parent / "results" / "dashboard.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "seconds": times}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS)
