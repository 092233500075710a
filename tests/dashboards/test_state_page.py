"""The page State: its views, what a choice changes, snippets that run, and what bad input meets."""

from dashboard_app import charts, errors, open_page, run_snippets

VIEWS = {"state_words", "state_contents", "state_norms", "state_curve", "state_shares", "state_lives", "state_decay"}
OTHER = "Then, Shelby and Emma had fun at the school. Emma gave an apple to"


def test_the_page_shows_the_name_in_a_state_and_its_snippets_run() -> None:
    app = open_page("state")
    assert errors(app) == ""
    assert set(charts(app)) == VIEWS
    words = charts(app)["state_words"]["data"][0]["text"]
    assert words[2][0] == "Emma"
    assert run_snippets(app) == len(VIEWS)


def test_a_link_opens_the_view_and_choices_change_it() -> None:
    app = open_page("state", layer="3", token="4", share="norm", state_channels="20")
    assert errors(app) == ""
    captions = " ".join(c.value for c in app.caption).replace("\\", "")
    assert "layer 3 after 4 Emma · 20 of 384 channels" in captions
    assert app.button_group(key="share").value == "norm"
    app.button_group(key="layer").set_value(1).run()
    assert app.query_params["layer"] == "1"
    assert "layer 1 after 4 Emma" in " ".join(c.value for c in app.caption).replace("\\", "")
    app.button_group(key="reader").set_value("last").run()
    assert "read at 15 to" in " ".join(c.value for c in app.caption)


def test_another_prompt_is_laid_over_and_said_where_it_parts() -> None:
    app = open_page("state", second=OTHER)
    assert errors(app) == ""
    assert "state_compared" in charts(app)
    assert "they part at position 11" in " ".join(c.value for c in app.caption)
    assert run_snippets(app) == len(VIEWS)


def test_bad_input_gives_a_message_where_it_belongs() -> None:
    app = open_page("state", second="Shelbi gave")
    assert "'Shelbi' (like Shelby" in errors(app)
    assert "state_words" in charts(app)
    app.text_input(key="prompt").set_value("Shelbi gave").run()
    assert "'Shelbi' (like Shelby" in errors(app)
    assert not charts(app)
    app.text_input(key="prompt").set_value("").run()
    assert errors(app) == ""
    assert "Type a prompt" in app.info[0].value
