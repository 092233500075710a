"""A browser and an app for all tests that need them."""

from collections.abc import Iterator
from typing import Any

import pytest


# No longer than a module: Playwright keeps an event loop running, which other tests must not meet.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from ssminterp_dashboards.browser import launch_browser

    with playwright.sync_playwright() as started:
        browser = launch_browser(started)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    from ssminterp_dashboards.browser import serving

    with serving() as address:
        yield address


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()
