"""The pages State, Flow, Memory and Learn as a reader meets them, in a real browser."""

import re

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from ssminterp_dashboards.browser import chart, click_cell, settle, why_not  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
expect = playwright.expect


def test_a_cell_of_the_state_is_clicked_and_its_link_followed(tab: playwright.Page, address: str) -> None:
    tab.goto(f"{address}/state")
    expect(tab.get_by_text("layer 2 after 15 to")).to_be_visible()
    chart(settle(tab), "state_norms")
    click_cell(tab, "state_norms", 4, 3)
    expect(tab.get_by_text("layer 4 after 3 and")).to_be_visible()
    chart(settle(tab), "state_words")
    click_cell(tab, "state_words", 1, 2)
    expect(tab.get_by_text("layer 1 after 3 and")).to_be_visible()
    settle(tab)
    fresh = tab.context.new_page()
    fresh.goto(tab.url)
    expect(fresh.get_by_text("layer 1 after 3 and")).to_be_visible()
    assert re.search(r"layer=1&token=3|token=3&layer=1", fresh.url)


def test_an_edge_is_clicked_and_the_answer_is_another(tab: playwright.Page, address: str) -> None:
    tab.goto(f"{address}/flow?source=1")
    expect(tab.get_by_text("after “15 to”").first).to_be_visible()
    chart(settle(tab), "flow_pairs")
    click_cell(tab, "flow_pairs", 15, 4)
    cut = chart(tab, "flow_cut")
    expect(cut.get_by_text("Quito")).to_be_visible()
    settle(tab)
    assert "source=" not in tab.url, "the source that was clicked, 4 Emma, is the default"


def test_a_cartridge_is_kept_changed_and_used_again(tab: playwright.Page, address: str) -> None:
    tab.goto(f"{address}/memory?memory=cartridges")
    answers = chart(settle(tab), "memory_answers")
    expect(answers.get_by_text("layers 0, 1, 2 of it")).to_be_visible()
    tab.get_by_role("button", name="Keep this cartridge").click()
    expect(tab.get_by_text("Kept in this session: 1")).to_be_visible()
    text = tab.get_by_label("Text of the cartridge")
    text.fill("Given red: spider, iron: lamp.")
    text.press("Control+Enter")
    expect(answers.get_by_text("spider", exact=True)).to_be_visible()
    tab.get_by_role("button", name="Use", exact=True).click()
    expect(text).to_have_value("Given red: tiger, iron: lamp.")
    settle(tab).get_by_role("button", name="5", exact=True).click()
    expect(answers.get_by_text("layers 0, 1, 2, 5 of it")).to_be_visible()
    assert "swap=0" in tab.url


def test_the_recurrence_is_read_by_keyboard_token_by_token(tab: playwright.Page, address: str) -> None:
    tab.goto(f"{address}/learn")
    expect(tab.get_by_text("the state is nothing yet")).to_be_visible()
    settle(tab).get_by_role("slider").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_text("Before met the state is h = 0.5")).to_be_visible()
    settle(tab).get_by_role("button", name="Read the next token").focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_text("Before John the state is h =")).to_be_visible()
    assert "learn_t=2" in tab.url
    tab.get_by_role("button", name="Next: Forgetting").click()
    expect(tab.get_by_text("each token keeps 77.9% of the state")).to_be_visible()
    settle(tab).get_by_role("slider").first.focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_text("each token keeps 70.5% of the state")).to_be_visible()
    assert "learn_delta=0.7" in tab.url
