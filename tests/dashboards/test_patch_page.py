"""The page Patch: from controls to a map, a cell from near, links, and bad input."""

import numpy as np
import pytest
from dashboard_app import charts, errors, finish, open_page
from streamlit.testing.v1 import AppTest

MODEL = {"model": "nano-mamba", "n": "2"}
OWN = {
    "model": "nano-mamba",
    "task": "my own prompts",
    "clean": "Then, Shelby and Emma had fun at the school. Shelby gave an apple to",
    "corrupted": "Then, Emma and Shelby had fun at the school. Emma gave an apple to",
}


def run(app: AppTest) -> AppTest:
    (button,) = [button for button in app.button if button.label == "Run"]
    return finish(button.click().run())


def test_an_empty_page_says_what_to_do() -> None:
    app = open_page("patch", **MODEL)
    assert errors(app) == ""
    assert "press **Run**" in app.info[0].value
    assert not charts(app)


def test_a_run_shows_the_map_its_strongest_cell_and_what_makes_them() -> None:
    app = run(open_page("patch", **MODEL))
    assert errors(app) == ""
    assert set(charts(app)) == {"map", "tokens", "each", "each_channel", "channels"}
    assert "neither is a bound" in " ".join(caption.value for caption in app.caption)
    snippets = [code.value for code in app.code]
    assert len(snippets) == 5
    made = []
    for snippet in snippets:
        names: dict = {}
        exec(snippet, names)
        made.append(names["figure"])
    shown = np.array(charts(app)["map"]["data"][1]["customdata"], dtype=object)
    np.testing.assert_allclose(np.ravel(made[0].data[0].z), shown[:, 2].astype(float), atol=1e-5)
    strongest = np.unravel_index(np.abs(made[0].data[0].z).argmax(), made[0].data[0].z.shape)
    assert (app.selectbox(key="cell_layer").value, app.selectbox(key="cell_token").value) == strongest


def test_choosing_a_cell_is_part_of_the_link_and_changes_only_the_near_view() -> None:
    app = run(open_page("patch", **MODEL))
    before = charts(app)
    app.selectbox(key="cell_layer").set_value(1).run()
    app.selectbox(key="cell_token").set_value(3).run()
    assert errors(app) == ""
    assert (app.query_params["cell_layer"], app.query_params["cell_token"]) == ("1", "3")
    after = charts(app)
    assert after["map"]["data"] == before["map"]["data"]
    assert after["map"]["layout"]["shapes"] != before["map"]["layout"]["shapes"]
    assert "layer 1 · position 3" in " ".join(c.value for c in app.caption)


def test_a_shared_link_runs_the_same_sweep_and_opens_the_same_cell() -> None:
    first = run(open_page("patch", **MODEL, hooks="delta,B", metric="probability"))
    first.selectbox(key="cell_layer").set_value(1).run()
    again = finish(open_page("patch", **first.query_params))
    assert errors(again) == ""
    assert charts(again)["map"]["data"] == charts(first)["map"]["data"]
    assert again.selectbox(key="cell_layer").value == 1
    again.button_group(key="hook").set_value("B").run()
    assert set(charts(again)) == {"map", "tokens", "each"}


def test_changed_options_wait_for_run() -> None:
    app = run(open_page("patch", **MODEL))
    app.selectbox(key="metric").set_value("kl").run()
    assert "press **Run**" in app.info[0].value
    assert errors(run(app)) == ""
    assert "KL from the clean run" in " ".join(c.value for c in app.caption)


@pytest.mark.parametrize(
    "options",
    [
        {"do": "zero", "hooks": "x"},
        {"do": "mean", "direction": "corrupted_to_clean"},
        {"do": "scale", "amount": "0.5", "columns": "roles"},
        {"do": "steer", "amount": "2.0", "hooks": "conv_taps"},
        {"attribution": "yes", "columns": "roles", "hooks": "gate"},
    ],
)
def test_every_way_to_change_a_cell_works(options: dict[str, str]) -> None:
    app = run(open_page("patch", **MODEL, **options))
    assert errors(app) == ""
    assert {"map", "tokens"} <= set(charts(app))
    assert ("attribution_map" in charts(app)) == ("attribution" in options)


def test_own_prompts_are_answered_by_the_model_unless_answers_are_named() -> None:
    app = run(open_page("patch", **OWN, answer="Emma", wrong="Shelby"))
    assert errors(app) == ""
    names: dict = {}
    exec(app.code[0].value, names)
    assert names["batch"].clean_prompts == [OWN["clean"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clean": "Shelby gave an apple to"}, "must have as many tokens, these have 5 and 16"),
        ({"clean": OWN["clean"].replace("apple", "aple")}, "'aple' (like apple"),
        ({"clean": " "}, "Write a clean and a corrupted prompt"),
        ({"clean": OWN["clean"] + "\n" + OWN["clean"]}, "2 clean and 1 corrupted"),
        ({"answer": "Emma", "wrong": "Emma"}, "same token"),
        ({"answer": "two words", "wrong": "Emma"}, "not one token"),
        ({"corrupted": OWN["clean"]}, "name an answer and a wrong answer"),
    ],
)
def test_bad_prompts_get_a_message(options: dict[str, str], message: str) -> None:
    app = open_page("patch", **OWN | options)
    assert message in errors(app)
    assert [button for button in app.button if button.label == "Run"], "the page goes on"


def test_a_map_with_many_columns_shows_the_strongest_and_has_a_way_to_the_rest() -> None:
    app = run(open_page("patch", model="nano-mamba", n="1", task="passkey", hooks="x"))
    assert errors(app) == ""
    assert len(charts(app)["map"]["data"][0]["x"]) == 48
    app.toggle(key="all_tokens").set_value(True).run()
    assert errors(app) == ""
    assert len(charts(app)["map"]["data"][0]["x"]) > 90
