"""The page Memory: timescales, survival, sinks; cartridges read, kept, asked and swapped; what bad input meets."""

from dashboard_app import charts, errors, open_page, run_snippets

TIMES = {"memory_horizons", "memory_survival", "memory_steps"}
CARTRIDGES = {"memory_answers", "memory_swaps"}


def texts(app: object) -> str:
    return " ".join(element.value.replace("\\", "") for element in (*app.caption, *app.markdown))  # type: ignore[attr-defined]


def test_timescales_survival_and_sinks() -> None:
    app = open_page("memory", layer="3", source="2")
    assert errors(app) == ""
    assert set(charts(app)) == TIMES
    assert "What is left of “2 Shelby”" in texts(app)
    found = app.dataframe[0].value
    assert (found["deviations"].abs() > 3.5).all()
    assert run_snippets(app) == 4
    app.button_group(key="sink").set_value(10.0).run()
    assert app.query_params["sink"] == "10.0"
    assert len(app.dataframe) == 0
    assert "lower the threshold" in app.info[0].value


def test_a_cartridge_answers_and_its_layers_decide() -> None:
    app = open_page("memory", memory="cartridges")
    assert errors(app) == ""
    assert set(charts(app)) == CARTRIDGES
    bars = {trace["name"]: trace for trace in charts(app)["memory_answers"]["data"]}
    assert list(bars) == ["the cartridge", "layers 0, 1, 2 of it", "the other text"]
    assert bars["the cartridge"]["y"][:2] == ["tiger", "lamp"]
    assert run_snippets(app) == 2
    app.button_group(key="swap").set_value(["3", "4", "5"]).run()
    assert app.query_params["swap"] == "3,4,5"
    again = open_page("memory", memory="cartridges", swap="3,4,5", question="Now iron:")
    assert "after “Now iron:”" in texts(again)
    assert [trace["name"] for trace in charts(again)["memory_answers"]["data"]][1] == "layers 3, 4, 5 of it"


def test_cartridges_are_kept_used_and_dropped() -> None:
    app = open_page("memory", memory="cartridges", other="")
    assert charts(app)["memory_answers"]["data"][2]["name"] == "nothing read"
    app.button[0].click().run()
    assert app.session_state["kept"] == ["Given red: tiger, iron: lamp."]
    app.text_area(key="cartridge").set_value("Given red: lamp.").run()
    app.button(key="use_0").click().run()
    assert app.text_area(key="cartridge").value == "Given red: tiger, iron: lamp."
    app.button(key="drop_0").click().run()
    assert app.session_state["kept"] == []
    assert errors(app) == ""


def test_bad_input_gives_a_message_where_it_belongs() -> None:
    app = open_page("memory", memory="cartridges", cartridge="Given rad: tiger")
    assert errors(app).count("'rad' (like") == 1
    app.text_area(key="cartridge").set_value(" ").run()
    assert "There is nothing to read" in errors(app)
    app.text_area(key="cartridge").set_value("Given red: tiger.").run()
    app.text_input(key="question").set_value("").run()
    assert errors(app) == ""
    assert "Type a question above" in app.info[0].value
    app.text_input(key="question").set_value("Now rad:").run()
    assert errors(app).count("'rad' (like") == 1
    assert app.text_area(key="cartridge").value == "Given red: tiger."
