"""The app as a reader meets it, in a real browser."""

import re

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from ssminterp_dashboards.browser import chart, click_cell, settle, why_not  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
expect = playwright.expect


def test_a_prompt_is_typed_and_a_click_on_the_lens_chooses_its_token(tab: playwright.Page, address: str) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    chart(settle(tab), "lens")
    box = tab.get_by_label("Prompt", exact=True)
    box.fill("Shelby gave an apple to")
    box.press("Enter")
    expect(tab.get_by_text("5 tokens: choose one")).to_be_visible()
    chart(settle(tab), "lens")
    click_cell(tab, "lens", 3, 1)
    expect(tab.get_by_text("after “1 gave”")).to_be_visible()
    assert re.search(r"[?&]token=1", tab.url)
    assert "prompt=Shelby" in tab.url
    outside = [url for url in asked if not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))]
    assert not outside, "the app asks nobody but its own server"


def test_a_sweep_is_run_a_cell_clicked_and_its_link_followed(tab: playwright.Page, address: str) -> None:
    tab.goto(f"{address}/patch?n=4")
    tab.get_by_role("button", name="Run").click()
    chart(tab, "map")
    chart(settle(tab), "tokens")
    click_cell(tab, "map", 4, 3)
    expect(tab.get_by_text(re.compile("state of layer 4 at 3 "))).to_be_visible()
    chart(settle(tab), "channels")
    link = tab.url
    assert "cell_layer=4" in link
    assert "cell_token=3" in link
    fresh = tab.context.browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    fresh.goto(link)
    expect(fresh.get_by_text(re.compile("state of layer 4 at 3 "))).to_be_visible()
    chart(settle(fresh), "channels")
    assert fresh.url == link
    fresh.context.close()


def test_bad_input_is_answered_in_the_page_and_the_app_goes_on(tab: playwright.Page, address: str) -> None:
    tab.goto(address)
    chart(settle(tab), "lens")
    box = tab.get_by_label("Prompt", exact=True)
    box.fill("Shelbi <img src=x onerror=alert(1)> gave")
    box.press("Enter")
    expect(tab.get_by_text("'Shelbi' (like Shelby")).to_be_visible()
    expect(tab.locator(".stMain img")).to_have_count(0)
    expect(tab.locator('[data-testid="stException"]')).to_have_count(0)
    box.fill(" ")
    box.press("Enter")
    expect(tab.get_by_text("Type a prompt above")).to_be_visible()
    tab.goto(f"{address}/?model=../../etc")
    expect(tab.get_by_text("neither a bundled model")).to_be_visible()
    tab.goto(f"{address}/patch?task=my+own+prompts&clean=Shelby+gave")
    expect(tab.get_by_text("must have as many tokens, these have 2 and 16")).to_be_visible()
    tab.get_by_role("link", name="Prompt").click()
    chart(settle(tab), "lens")


def test_a_long_sweep_is_stopped_while_another_tab_works(tab: playwright.Page, address: str) -> None:
    other = tab.context.new_page()
    other.goto(f"{address}/?prompt=Emma+gave+an+apple+to")
    chart(settle(other), "lens")
    expect(other.get_by_text("5 tokens: choose one")).to_be_visible()
    tab.goto(f"{address}/patch?n=64&hooks=resid_pre,mixer_out,conv,state,x,delta,B,C,gate")
    settle(tab).get_by_role("button", name="Run").click()
    # Not Streamlit's own button of that name, which is in the header while a page runs.
    stop = tab.get_by_test_id("stBaseButton-secondary").filter(has_text="Stop")
    stop.wait_for()
    other.get_by_text("an 2", exact=True).click()
    expect(other.get_by_text("after “2 an”")).to_be_visible()
    stop.click()
    expect(tab.get_by_text(re.compile("Stopped after [0-9]+ of [0-9]+ parts"))).to_be_visible()
    expect(settle(other).get_by_text("Stopped")).to_have_count(0)


def test_the_sweep_is_run_by_keyboard_alone(tab: playwright.Page, address: str) -> None:
    tab.goto(f"{address}/patch?n=1&model=nano-mamba")
    prompts = settle(tab).get_by_label("Prompts", exact=True)
    run = tab.get_by_test_id("stBaseButton-primary").filter(has_text="Run")
    # A page has run before its parts are drawn.
    expect(prompts).to_be_visible()
    expect(run).to_be_visible()
    prompts.focus()
    for _ in range(12):
        tab.keyboard.press("Tab")
        if run.evaluate("button => button === document.activeElement"):
            break
    expect(run).to_be_focused()
    tab.keyboard.press("Enter")
    chart(tab, "map")
