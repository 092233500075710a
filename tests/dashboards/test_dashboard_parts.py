"""What the pages are made of: safe text, links, jobs, which models a browser may open, how the server is started."""

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest
import xarray as xr
from streamlit.runtime.scriptrunner_utils.exceptions import StopException
from streamlit.testing.v1 import AppTest

from ssminterp_dashboards import jobs, launch, models, sweeps, text, views
from ssminterp_dashboards import turns as turns_module
from ssminterp_dashboards.errors import message_of


def test_text_is_shown_as_it_is_written() -> None:
    nasty = "<img src=x> [a](http://b) ![c](d) $x$ :red[e] *f* `g` # h\n- i"
    shown = text.plain(nasty)
    assert "\n" not in shown
    for mark in "<[]()$:*`#!-":
        assert shown.count(mark) == shown.count("\\" + mark)
    assert shown.replace("\\", "") == nasty.replace("\n", " ")


@pytest.mark.parametrize(
    ("token", "shown"), [(" Emma", "Emma"), ("\n", "↵"), (" ", "␣"), ("", "∅"), ("<b>", "\\<b\\>")]
)
def test_tokens_that_cannot_be_seen_have_signs(token: str, shown: str) -> None:
    assert text.token_chip(3, token) == f"{shown} :gray[3]"


def test_links_take_values_of_the_defaults_type_and_drop_what_is_not_offered() -> None:
    def app() -> None:
        import streamlit as st

        from ssminterp_dashboards import links

        chosen = links.choice("n", 3), links.choice("on", False), links.choice("many", ["a"], "abc")
        st.text(repr((*chosen, links.choice("odd", 1, range(3)), links.choice("real", 0.5), links.choice("bad", 2))))

    page = AppTest.from_function(app)
    page.query_params.update({"n": "5", "on": "yes", "many": "c,z,b", "odd": "9", "real": "1.5", "bad": "x"})
    page.run()
    assert not page.exception
    assert page.text[0].value == "(5, True, ['c', 'b'], 1, 1.5, 2)"
    assert page.query_params == {"n": "5", "on": "yes", "many": "c,b", "real": "1.5"}


@pytest.mark.parametrize(
    "name", ["/etc", "..", "../../x", "a/../b", "~/models", "no slash", "a/b/c", "file:///etc", ""]
)
def test_a_browser_cannot_open_paths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.MODEL_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="neither a bundled model"):
        models.allowed(name)


def test_a_folder_is_opened_only_if_the_app_was_started_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(launch.MODEL_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="start the app with it"):
        models.allowed("owner/folder")
    name = launch.environment("owner/folder")[launch.MODEL_VARIABLE]
    assert name == str(tmp_path / "owner" / "folder")
    monkeypatch.setenv(launch.MODEL_VARIABLE, name)
    assert models.allowed(name) == name
    assert models.choices()[0] == name


def test_the_server_is_for_this_machine_only_and_reports_to_nobody() -> None:
    command = launch.command(8600)
    assert "--server.allowedHosts=localhost" in command
    for flag in ("--server.address=localhost", "--browser.gatherUsageStats=false", "--client.showErrorDetails=none"):
        assert flag in command
    assert launch.free_port() > 0


def test_models_are_loaded_once_and_run_one_at_a_time() -> None:
    key = models.ModelKey("nano-mamba")
    loaded = models.load(key)
    assert models.load(key) is loaded
    entered = threading.Event()
    other = threading.Thread(target=lambda: loaded.ready().__enter__() and entered.set())
    with loaded.ready():
        other.start()
        assert not entered.wait(0.2)


def test_a_run_of_a_page_ends_at_the_next_layer_when_its_reader_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamlit raises where it is asked; the model is left as it was, and the next run is not disturbed."""
    loaded = models.load.__wrapped__(models.ModelKey("nano-mamba"))  # type: ignore[attr-defined]
    asked: list[bool] = []

    def stop_at_the_second_layer() -> None:
        asked.append(True)
        if len(asked) == 2:
            raise StopException

    monkeypatch.setattr(models, "get_run_yield_check", lambda: stop_at_the_second_layer)
    with pytest.raises(StopException), loaded.ready() as model:
        model("Shelby gave an apple to")
    assert len(asked) == 2
    monkeypatch.setattr(models, "get_run_yield_check", lambda: None)
    with loaded.ready() as model:
        model("Shelby gave an apple to")
    assert len(asked) == 2


def test_only_so_many_models_are_held_and_the_others_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    first = weakref.ref(models.load(models.ModelKey("nano-mamba", dtype="bfloat16")).model)
    assert first() is not None
    others = [models.load(models.ModelKey(name)) for name in ("nano-mamba", "tiny-mamba")]
    assert len(others) == models.N_MODELS
    gc.collect()
    assert first() is None


def test_turns_are_taken_in_the_order_of_asking_and_can_be_nested() -> None:
    turns, order = turns_module.Turns(), []

    def take(name: str) -> None:
        with turns, turns:
            order.append(name)

    threads = [threading.Thread(target=take, args=(name,)) for name in "abcde"]
    with turns:
        for i, thread in enumerate(threads):
            thread.start()
            while len(turns._waiting) <= i:
                time.sleep(0.001)
    take("again")
    for thread in threads:
        thread.join(10)
    assert order == [*"abcde", "again"]


def test_a_job_keeps_what_is_finished_when_it_is_stopped() -> None:
    began, goes_on = threading.Event(), threading.Event()

    def second() -> int:
        began.set()
        goes_on.wait(10)
        return 2

    job = jobs.Job("name", {"first": lambda: 1, "second": second, "third": lambda: 3})
    assert began.wait(10)
    assert not job.over
    job.stop()
    goes_on.set()
    assert job.wait(10)
    assert job.finished == {"first": 1, "second": 2}
    assert job.stopped


def test_a_job_that_fails_says_why_and_one_that_is_forgotten_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ValueError("no such thing")

    job = jobs.Job("name", {"first": lambda: 1, "second": fails, "third": lambda: 3})
    assert job.wait(10)
    assert job.finished == {"first": 1}
    assert str(job.error) == "no such thing"
    monkeypatch.setattr(jobs, "FORGOTTEN_AFTER", 0.05)
    forgotten = jobs.Job("name", {i: lambda: time.sleep(0.05) for i in range(100)})
    forgotten._thread.join(10)
    assert forgotten.stopped


def test_parts_of_a_sweep_are_put_together_with_gaps_where_none_is_finished() -> None:
    request = sweeps.Request(models.ModelKey("nano-mamba"), sweeps.Pairs("ioi", 2))
    parts = [sweeps.part(request, "x", (1,)), sweeps.part(request, "delta", (0,))]
    whole = sweeps.assembled(parts, ["x", "delta"], 2)
    assert whole.dims == ("hook", "layer", "position")
    xr.testing.assert_equal(whole.sel(hook=["x"], layer=[1]), parts[0])
    assert whole.sel(hook="x", layer=0).isnull().all()
    assert whole.attrs["clean"] == parts[0].attrs["clean"]
    assert whole["position"].values.tolist() == parts[0]["position"].values.tolist()


def test_downloads_hold_the_numbers_and_their_labels(tmp_path: Path) -> None:
    request = sweeps.Request(models.ModelKey("nano-mamba"), sweeps.Pairs("ioi", 2))
    part = sweeps.part(request, "x", (1,))
    (tmp_path / "part.nc").write_bytes(views.as_netcdf(part))
    xr.testing.assert_identical(xr.load_dataarray(tmp_path / "part.nc").drop_attrs(), part.drop_attrs())
    assert views.as_csv(part).splitlines()[0] == "hook,layer,position,logit_diff"
    assert len(views.as_csv(part).splitlines()) == part.size + 1


def test_errors_become_messages() -> None:
    assert message_of(ValueError("what to do")) == "what to do"
    assert "not enough memory" in message_of(MemoryError())
    assert "not enough memory" in message_of(RuntimeError("DefaultCPUAllocator: not enough memory: you tried"))
    assert "nobody foresaw (KeyError)" in message_of(KeyError("secret"))
    assert "secret" not in message_of(KeyError("secret"))
