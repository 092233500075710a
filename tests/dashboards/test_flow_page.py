"""The page Flow: the graph of the answer, token-to-token maps, an edge cut, and what bad input meets."""

from dashboard_app import charts, errors, open_page, run_snippets

VIEWS = {"flow_graph", "flow_pairs", "flow_cut", "flow_layers"}


def captions(app: object) -> str:
    return " ".join(element.value.replace("\\", "") for element in app.caption)  # type: ignore[attr-defined]


def test_the_route_of_the_name_is_shown_and_cut_and_snippets_run() -> None:
    app = open_page("flow")
    assert errors(app) == ""
    assert set(charts(app)) == VIEWS
    assert "logit of “Emma” − “Shelby”" in captions(app)
    assert app.dataframe[0].value["path"][0] == "4 Emma → (x of layer 0) → (state of layer 2) 15 to"
    as_it_is, without = charts(app)["flow_cut"]["data"]
    assert as_it_is["y"][0] == "Emma"
    assert "100.0%" in as_it_is["text"][0]
    assert "100.0%" not in without["text"][0]
    assert run_snippets(app) == len(VIEWS)


def test_choices_change_the_views_and_a_link_brings_them_back() -> None:
    app = open_page("flow")
    app.select_slider(key="threshold").set_value(0.3).run()
    app.button_group(key="flow_map").set_value("attention").run()
    app.text_input(key="instead").set_value("Helen").run()
    app.select_slider(key="source").set_value(2).run()
    app.button_group(key="cut").set_value("all").run()
    app.button_group(key="decay").set_value("skipped").run()
    link = dict(app.query_params)
    assert link == {
        "threshold": "0.3",
        "flow_map": "attention",
        "instead": "Helen",
        "source": "2",
        "cut": "all",
        "decay": "skipped",
    }
    again = open_page("flow", **link)
    assert errors(again) == ""
    assert "“Emma” − “Helen”" in captions(again)
    assert "edges of at least 30% of it" in captions(again)
    assert run_snippets(again) == len(VIEWS)


def test_bad_input_gives_a_message_where_it_belongs() -> None:
    app = open_page("flow", source="9", token="4")
    assert errors(app) == ""
    assert "cannot read it" in app.info[0].value
    assert "flow_graph" in charts(app)
    app.text_input(key="answer").set_value("red tiger").run()
    assert "is 2 tokens for this model" in errors(app)
    app.text_input(key="answer").set_value("Emmma").run()
    assert "'Emmma' (like Emma" in errors(app)
    app.text_input(key="answer").set_value("Shelby").run()
    app.text_input(key="instead").set_value("Shelby").run()
    assert "name two that compete" in errors(app)
    app.text_input(key="prompt").set_value("Shelby " * 300).run()
    assert "this page follows up to 256" in errors(app)


def test_where_nothing_is_strong_enough_the_page_says_what_to_do() -> None:
    app = open_page("flow", threshold="1.0")
    assert errors(app) == ""
    assert "lower the threshold" in app.info[0].value
    assert set(charts(app)) == VIEWS - {"flow_graph"}
