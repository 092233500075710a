"""The page Prompt: what it shows, what a choice changes, and what bad input meets."""

import json
from pathlib import Path

import pytest
from dashboard_app import charts, errors, open_page, run_snippets

from ssminterp import HookedMamba
from ssminterp_dashboards.launch import MODEL_VARIABLE

SHORT = "Shelby gave an apple to"


def test_the_page_opens_with_a_prompt_and_its_views() -> None:
    app = open_page("prompt")
    assert errors(app) == ""
    assert set(charts(app)) == {"predictions", "steps", "lens"}
    best = charts(app)["predictions"]["data"][0]["y"]
    assert best[0] == "1. Emma"
    assert run_snippets(app) == 3


def test_a_long_prompt_is_shown_in_windows() -> None:
    prompt = " ".join(["Shelby gave an apple to Emma."] * 20)
    app = open_page("prompt", prompt=prompt, model="nano-mamba", token="7", **{"from": "5"})
    assert errors(app) == ""
    assert len(app.button_group(key="token").options) == 48
    shown = charts(app)
    assert shown["lens"]["data"][0]["x"][0].startswith("5 ")
    assert len(shown["steps"]["data"][0]["x"]) == 48
    captions = " ".join(c.value for c in app.caption)
    assert "after “7 " in captions
    assert "The text goes on with" in captions
    app.slider(key="from").set_value(60).run()
    assert errors(app) == ""
    assert app.button_group(key="token").value == 107


def test_a_link_opens_the_view_that_it_was_copied_from() -> None:
    app = open_page("prompt", prompt=SHORT, token="1", model="nano-mamba", step="decay")
    assert errors(app) == ""
    assert app.text_input(key="prompt").value == SHORT
    captions = " ".join(c.value for c in app.caption)
    assert "1 gave" in captions
    assert "nano\\-mamba" in captions
    assert "mean A̅" in captions


def test_choices_become_part_of_the_link() -> None:
    app = open_page("prompt")
    app.text_input(key="prompt").set_value(SHORT).run()
    app.button_group(key="token").set_value(2).run()
    assert errors(app) == ""
    assert app.query_params["prompt"] == SHORT
    assert app.query_params["token"] == "2"
    assert "after “2 an" in " ".join(c.value for c in app.caption)


def test_nothing_is_run_again_by_an_unrelated_click(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    forward = HookedMamba.forward
    monkeypatch.setattr(HookedMamba, "forward", lambda *args, **kw: runs.append(1) or forward(*args, **kw))
    app = open_page("prompt", prompt="Rachel gave an apple to")
    assert runs
    runs.clear()
    app.button_group(key="token").set_value(1).run()
    app.button_group(key="step").set_value("decay").run()
    assert errors(app) == ""
    assert not runs


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"prompt": "Shelbi gave an apple to"}, "'Shelbi' (like Shelby"),
        ({"prompt": "Shelby " * 1100}, "shorten it"),
        ({"model": "../../etc"}, "neither a bundled model"),
        ({"model": "tests/dashboards"}, "folder"),
    ],
)
def test_bad_input_gives_a_message(query: dict[str, str], message: str) -> None:
    app = open_page("prompt", **query)
    assert message in errors(app)
    assert not charts(app)


def test_a_checkpoint_that_cannot_be_loaded_gives_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    monkeypatch.setenv(MODEL_VARIABLE, str(tmp_path))
    app = open_page("prompt")
    assert str(tmp_path) in errors(app)
    assert not charts(app)
    app.selectbox(key="model").set_value("nano-mamba").run()
    assert errors(app) == ""
    assert charts(app)


def test_an_empty_prompt_says_what_to_do() -> None:
    app = open_page("prompt")
    app.text_input(key="prompt").set_value("  ").run()
    assert errors(app) == ""
    assert "Type a prompt" in app.info[0].value


def test_another_model_is_loaded_only_when_the_reader_agrees() -> None:
    app = open_page("prompt", model="someone/some-mamba")
    assert errors(app) == ""
    assert "not on this machine" in app.warning[0].value
    assert not charts(app)


def test_a_task_fills_the_prompt() -> None:
    app = open_page("prompt")
    app.button(key="pick_0").click().run()
    assert errors(app) == ""
    assert app.text_input(key="prompt").value.replace("'", "") in app.button(key="pick_0").label.replace("\\", "")
    assert json.loads(json.dumps(app.query_params))["prompt"]
