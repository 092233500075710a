"""Pages in Streamlit's simulated app: the real script and widgets, no browser."""

import json

import plotly.graph_objects as go
from streamlit.testing.v1 import AppTest

from ssminterp_dashboards.launch import APP


def open_page(name: str, timeout: float = 60, **query: str) -> AppTest:
    """The app after its first run with the page `name` open, as a link with these query parameters opens it.

    An exception that reached the script fails the test that asked for the page.
    """
    app = AppTest.from_file(str(APP), default_timeout=timeout)
    # Choices that pages share are taken from the link by the first page that runs.
    app.query_params.update(query)
    if name != "prompt":
        app.run().switch_page(f"screens/{name}.py")
        app.query_params.update(query)
    return app.run()


def errors(app: AppTest) -> str:
    """The messages that the page shows; fails if it shows a traceback."""
    assert not app.exception, [e.value for e in app.exception]
    return "\n".join(e.value.replace("\\", "") for e in app.error)


def charts(app: AppTest) -> dict[str, dict]:
    """The figures that the page shows, as plotly's JSON, by their keys."""
    found = {}
    for chart in app.get("plotly_chart"):
        key = chart.proto.id.split("-")[-1]
        found[key] = json.loads(chart.proto.spec)
    return found


def run_snippets(app: AppTest) -> int:
    """Run every snippet that the page shows, as it stands; each must leave a figure. Returns how many there were."""
    for code in app.code:
        names: dict[str, object] = {}
        exec(code.value, names)
        assert isinstance(names["figure"], go.Figure)
    return len(app.code)


def finish(app: AppTest, seconds: float = 60) -> AppTest:
    """The app once the job that it has started is over, as its polling would show it."""
    job = app.session_state.get("patch_job", None)
    if job is not None:
        assert job.wait(seconds), "the job is not over in time"
        app.run()
    return app
