"""The page Learn: five screens, steps by hand, sliders that change what is shown, snippets that run."""

import pytest
from dashboard_app import charts, errors, open_page, run_snippets


@pytest.mark.parametrize(
    ("screen", "views"),
    [
        ("1", {"learn_steps"}),
        ("2", {"learn_forgetting", "learn_story"}),
        ("3", {"learn_ways"}),
        ("4", {"learn_held", "learn_kernel"}),
        ("5", {"learn_map", "learn_real_held"}),
    ],
)
def test_every_screen_is_a_link_and_its_snippets_run(screen: str, views: set[str]) -> None:
    app = open_page("learn", learn=screen)
    assert errors(app) == ""
    assert set(charts(app)) == views
    assert run_snippets(app) == len(views)


def test_reading_the_next_token_moves_on_and_ends_at_the_last() -> None:
    app = open_page("learn", learn_t="4")
    assert app.select_slider(key="learn_t").value == 4
    app.button(key="learn_t_next").click().run()
    assert app.query_params["learn_t"] == "5"
    assert app.button(key="learn_t_next").disabled
    assert "shop" in " ".join(m.value for m in app.markdown)


def test_a_larger_step_keeps_less() -> None:
    app = open_page("learn", learn="2")
    before = charts(app)["learn_forgetting"]["data"][0]["y"]
    app.select_slider(key="learn_delta").set_value(2.0).run()
    assert errors(app) == ""
    assert app.query_params["learn_delta"] == "2.0"
    after = charts(app)["learn_forgetting"]["data"][0]["y"]
    assert after != before


def test_the_convolution_is_right_only_where_nothing_is_selected() -> None:
    app = open_page("learn", learn="4")
    assert "is off by up to" in " ".join(m.value for m in app.markdown)
    app.select_slider(key="learn_others").set_value(2.0).run()
    assert "the convolution is right again" in " ".join(m.value for m in app.markdown)


def test_the_real_channel_agrees_with_the_model_and_bad_input_gives_a_message() -> None:
    app = open_page("learn", learn="5", learn_channel="7", learn_layer="1")
    (caption,) = [c.value for c in app.caption if "y differs by at most" in c.value]
    assert float(caption.split("at most ")[1].split(" ")[0]) < 1e-3
    app.text_input(key="learn_prompt").set_value("Shelbi gave").run()
    assert "'Shelbi' (like Shelby" in errors(app)
    app.text_input(key="learn_prompt").set_value("").run()
    assert "no tokens" in errors(app)


def test_a_link_with_nonsense_opens_the_defaults() -> None:
    app = open_page("learn", learn="9", learn_t="99", learn_delta="nan", learn_channel="100000")
    assert errors(app) == ""
    assert set(charts(app)) == {"learn_steps"}
