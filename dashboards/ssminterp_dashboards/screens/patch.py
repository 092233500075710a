"""The page Patch: a map of what each place carries, and each of its cells from near."""

from __future__ import annotations

from typing import Literal

import streamlit as st
import xarray as xr

from ssminterp.patching import changed_tokens, compare_with_exact, strongest
from ssminterp.patching.request import DIRECTIONS
from ssminterp.plots import (
    changed_tokens_figure,
    channel_map,
    clickable,
    parts_bars,
    patching_heatmap,
    strongest_columns,
)
from ssminterp.tasks import TASKS
from ssminterp_dashboards import links, models, results, snippets, sweeps, views
from ssminterp_dashboards.errors import guarded, panel
from ssminterp_dashboards.jobs import Job
from ssminterp_dashboards.models import Loaded
from ssminterp_dashboards.sweeps import Pairs, Request
from ssminterp_dashboards.text import plain

# A job that is over so soon is shown without a progress bar.
SOON = 2.0
# More columns than this cannot be read.
MOST_COLUMNS = 48
OWN = "my own prompts"
FIRST_HOOKS = ("state", "x", "delta", "B", "C", "gate", "y", "mixer_out", "resid_pre")
ARROWS = {"clean_to_corrupted": "clean → corrupted", "corrupted_to_clean": "corrupted → clean"}
COLUMNS: tuple[Literal["tokens", "roles"], ...] = ("tokens", "roles")
CLEAN = "Then, Shelby and Emma had fun at the school. Shelby gave an apple to"
CORRUPTED = "Then, Emma and Shelby had fun at the school. Emma gave an apple to"


def page() -> None:
    loaded = models.current()
    left, right = st.columns([3, 9], gap="large")
    with left:
        request, hooks = choose(loaded)
    with right, guarded():
        batch = sweeps.batch_of(request.key, request.pairs, request.columns)
        show_pair(loaded, batch)
        job = job_for(request, hooks)
        if job is None:
            st.info(
                "Choose what to patch on the left, then press **Run**. Every cell of the map is one run of the model, "
                "in which one layer's value at one token comes from the other prompt.",
                icon=":material/play_circle:",
            )
        elif not job.over:
            progress(loaded, request, hooks, job)
        else:
            finished(loaded, request, hooks, job)


def choose(loaded: Loaded) -> tuple[Request, list[str]]:
    """The controls on the left: prompts, hooks, what to do, how to measure it."""
    source = links.choice("task", "ioi", [*TASKS, OWN])
    st.selectbox("Prompts", [*TASKS, OWN], format_func=results.task_label, key="task")
    pairs = own_prompts() if source == OWN else task_prompts(source)
    names = [spec.short for spec in loaded.model.hook_specs if spec.place != "model"]
    names = [*FIRST_HOOKS, *(name for name in names if name not in FIRST_HOOKS)]
    meaning = {spec.short: spec.meaning for spec in loaded.model.hook_specs}
    hooks = links.choice("hooks", ["state"], names)
    st.multiselect(
        "What to patch",
        names,
        key="hooks",
        help="  \n".join(f"**{plain(name)}** {plain(meaning[name])}" for name in names),
    )
    with st.expander("What to do, and how to measure it", icon=":material/tune:"):
        request = options(loaded, pairs)
    st.button(
        "Run", type="primary", icon=":material/play_arrow:", width="stretch", on_click=_run, args=(request, hooks)
    )
    return request, hooks


def task_prompts(task: str) -> Pairs:
    """How many prompts of a task."""
    n = links.choice("n", 8, range(1, 65))
    st.slider("Prompt pairs", 1, 64, key="n")
    seed = links.choice("seed", 0, range(1000))
    return Pairs(task, n, seed)


def own_prompts() -> Pairs:
    """Prompts that the reader writes."""
    texts = {"clean": CLEAN, "corrupted": CORRUPTED}
    given = {}
    for name, default in texts.items():
        links.choice(name, default)
        given[name] = st.text_area(f"{name.capitalize()}, one prompt a line", key=name, height=100) or ""
    for name, label in (("answer", "Answer"), ("wrong", "Wrong answer")):
        links.choice(name, "")
        given[name] = st.text_input(label, key=name, placeholder="what the model says, if left empty") or ""
    lines = {name: tuple(line for line in text.splitlines() if line.strip()) for name, text in given.items()}
    return Pairs("", 0, 0, lines["clean"], lines["corrupted"], lines["answer"], lines["wrong"])


def options(loaded: Loaded, pairs: Pairs) -> Request:
    """What to do at a cell, in which run, and how to measure the answer."""
    direction = links.choice("direction", DIRECTIONS[0], DIRECTIONS)
    st.segmented_control("Direction", DIRECTIONS, format_func=ARROWS.get, key="direction", required=True)
    intervention = links.choice("do", "patch", sweeps.INTERVENTIONS)
    st.selectbox("At each cell", list(sweeps.INTERVENTIONS), format_func=sweeps.INTERVENTIONS.get, key="do")
    amount = 1.0
    if intervention in ("scale", "steer"):
        amount = links.choice("amount", 0.5)
        st.slider(
            "Factor" if intervention == "scale" else "Strength (1 is a patch)", -2.0, 3.0, step=0.25, key="amount"
        )
    columns = links.choice("columns", COLUMNS[0], COLUMNS)
    st.segmented_control(
        "Columns",
        COLUMNS,
        key="columns",
        required=True,
        help="Roles are the same word's place in each prompt.",
    )
    metric = links.choice("metric", "logit_diff", sweeps.METRICS)
    st.selectbox("Metric", list(sweeps.METRICS), format_func=sweeps.METRICS.get, key="metric")
    return Request(loaded.key, pairs, columns, metric, direction, intervention, amount)


def show_pair(loaded: Loaded, batch: sweeps.TaskBatch) -> None:
    """The first pair of prompts with its answers."""
    words = [loaded.model.to_str_tokens(ids[:1])[0].strip() for ids in (batch.answers, batch.wrong_answers)]
    rest = f"and {len(batch) - 1} more pairs like it" if len(batch) > 1 else ""
    st.markdown(
        f":gray[clean] {plain(batch.clean_prompts[0])} → **{plain(words[0])}**  \n"
        f":gray[corrupted] {plain(batch.corrupted_prompts[0])} → **{plain(words[1])}**  \n:gray[{rest}]"
    )


def _run(request: Request, hooks: list[str]) -> None:
    st.session_state["run"] = sweeps.digest(request, hooks)
    _stop()
    st.session_state.pop("patch_job", None)


def _stop() -> None:
    job = st.session_state.get("patch_job")
    if job is not None:
        job.stop()


def job_for(request: Request, hooks: list[str]) -> Job | None:
    """The job of this request: the one that runs, or one that the reader or the link has asked for; else None."""
    name = sweeps.digest(request, hooks)
    wanted = links.choice("run", "")
    job = st.session_state.get("patch_job")
    if job is not None and job.name == name:
        return job
    if wanted != name:
        return None
    _stop()
    job = Job(name, sweeps.parts(request, hooks))
    st.session_state["patch_job"] = job
    job.wait(SOON)
    return job


@st.fragment(run_every=0.8)
def progress(loaded: Loaded, request: Request, hooks: list[str], job: Job) -> None:
    """How far the sweep is, what it has found, and a way to stop it."""
    with guarded():
        if job.over:
            st.rerun()
        bar, stop = st.columns([6, 1], vertical_alignment="center")
        bar.progress(len(job.finished) / job.total, f"{len(job.finished)} of {job.total} parts are finished")
        stop.button("Stop", icon=":material/stop:", on_click=job.stop, width="stretch")
        if job.finished:
            sweep = whole(loaded, hooks, job)
            views.show(patching_heatmap(sweep.sel(hook=hooks[0])), "partial", loaded, take=False)


def whole(loaded: Loaded, hooks: list[str], job: Job) -> xr.DataArray:
    """What a job has found, as one array."""
    return sweeps.assembled(list(job.finished.values()), hooks, loaded.model.cfg.n_layers)


def finished(loaded: Loaded, request: Request, hooks: list[str], job: Job) -> None:
    """The map of a sweep that is over, and its cells from near."""
    if job.error is not None:
        raise job.error
    if job.stopped or len(job.finished) < job.total:
        st.warning(
            f"Stopped after {len(job.finished)} of {job.total} parts. What is finished is kept: **Run** goes on "
            "from there.",
            icon=":material/pause_circle:",
        )
    if not job.finished:
        return
    sweep = whole(loaded, hooks, job)
    hook = links.choice("hook", hooks[0], hooks)
    if len(hooks) > 1:
        st.segmented_control("Shown", hooks, key="hook", required=True)
    explore(loaded, request, hooks, sweep, hook)


@panel
def explore(loaded: Loaded, request: Request, hooks: list[str], sweep: xr.DataArray, hook: str) -> None:
    """The map of one hook; the cell that is chosen in it, from near."""
    one = sweep.sel(hook=hook)
    labels = [str(label) for label in one["position"].values]
    top = strongest(sweep, n=1, hooks=[hook]).iloc[0]
    layer = links.choice("cell_layer", int(top["layer"]), range(one.sizes["layer"]))
    column = links.choice("cell_token", labels.index(str(top["position"])), range(len(labels)))
    shown = columns_shown(one)
    views.show(
        clickable(
            patching_heatmap(one.isel(position=shown)), (layer, shown.index(column)) if column in shown else None
        ),
        "map",
        loaded,
        data=sweep,
        snippet=snippets.sweep(loaded, request, [hook, *(other for other in hooks if other != hook)]),
        note=f"{sweeps.METRICS[request.metric]}; {sweeps.INTERVENTIONS[request.intervention]}  \nStrongest: layer "
        f"{top['layer']} at {plain(str(top['position']))}, {top['moved']:.0%} of the way. 0 % is the run "
        "that is changed, 100 % the other one, and neither is a bound: one cell can overshoot.  \n:material/touch_app: "
        "Click a cell to see it from near.",
        on_click=lambda row, place: _choose(row, shown[place]),
        in_panel=True,
    )
    if request.intervention == "patch":
        beside(loaded, request, hook, sweep, shown)
    st.divider()
    drill_down(loaded, request, hook, layer, column, labels)


def columns_shown(one: xr.DataArray) -> list[int]:
    """The columns of a map that can be read: the strongest of many, unless the reader wants all."""
    n = one.sizes["position"]
    if n <= MOST_COLUMNS:
        return list(range(n))
    everything = links.choice("all_tokens", False)
    st.toggle(f"All {n} tokens, not only the {MOST_COLUMNS} where most changes", key="all_tokens")
    return list(range(n)) if everything else strongest_columns(one, MOST_COLUMNS)


def _choose(row: int, column: int) -> None:
    st.session_state["cell_layer"], st.session_state["cell_token"] = row, column


def beside(loaded: Loaded, request: Request, hook: str, sweep: xr.DataArray, shown: list[int]) -> None:
    """Attribution's estimate of the same map, and how far it agrees."""
    wanted = links.choice("attribution", False)
    st.toggle("Attribution beside it (one gradient instead of one run per cell)", key="attribution")
    if not wanted:
        return
    effects = sweeps.attribution(request, hook)
    agreement = compare_with_exact(effects, sweep.sel(hook=[hook])).iloc[0]
    views.show(
        patching_heatmap(effects.sel(hook=hook).isel(position=shown), title=f"Attribution: {hook}, estimated"),
        "attribution_map",
        loaded,
        data=effects,
        snippet=snippets.attribution(loaded, request, hook),
        note=f"rank correlation with the exact map {agreement['spearman']:.2f}; of the "
        f"{min(10, int(agreement['cells']))} strongest cells {agreement['top_k_overlap']:.0%} are the same",
    )


def drill_down(loaded: Loaded, request: Request, hook: str, layer: int, column: int, labels: list[str]) -> None:
    """One cell: the tokens it changes, its channels and its state coordinates."""
    pick_layer, pick_column, pick_example = st.columns([1, 2, 4])
    pick_layer.selectbox("Layer", range(loaded.model.cfg.n_layers), key="cell_layer")
    pick_column.selectbox("Token", range(len(labels)), format_func=lambda i: labels[i], key="cell_token")
    batch = sweeps.batch_of(request.key, request.pairs, request.columns)
    example = links.choice("example", 0, range(len(batch)))
    prompts = batch.clean_prompts
    pick_example.selectbox("Prompt pair", range(len(batch)), format_func=lambda i: prompts[i], key="example")
    left, right = st.columns(2, gap="large")
    with left:
        changed = changed_tokens(loaded.model, sweeps.logits(request, hook, layer, column), example)
        snippet = snippets.cell(loaded, request, hook, layer, column, example)
        views.show(changed_tokens_figure(changed), "tokens", loaded, data=changed, snippet=snippet)
    found = sweeps.cell_parts(request, hook, layer, column, 8)
    with right:
        coordinates(loaded, request, hook, layer, column, found)
    channels(loaded, request, hook, layer, column, found)


def coordinates(loaded: Loaded, request: Request, hook: str, layer: int, column: int, found: sweeps.CellParts) -> None:
    """Each coordinate of the state alone, or each of the strongest channels where a hook has no coordinates."""
    exact = found.channels if found.coordinates is None else found.coordinates
    if exact is None:
        return
    dim = exact.dims[0]
    estimated = found.estimated
    if estimated is not None:
        estimated = estimated.sum([other for other in estimated.dims if other != dim], keep_attrs=True)
    names = [] if dim == "coordinate" else [str(label) for label in exact[dim].values]
    views.show(
        parts_bars(exact, estimated),
        "each",
        loaded,
        data=exact,
        snippet=snippets.parts(loaded, request, hook, layer, column, names),
    )


def channels(loaded: Loaded, request: Request, hook: str, layer: int, column: int, found: sweeps.CellParts) -> None:
    """Channels by coordinates, the strongest first; the strongest channels alone."""
    if found.coordinates is None or found.channels is None:
        return
    left, right = st.columns(2, gap="large")
    estimated = found.estimated
    with right:
        by_channel = None if estimated is None else estimated.sum("coordinate", keep_attrs=True)
        names = [str(label) for label in found.channels["channel"].values]
        views.show(
            parts_bars(found.channels, by_channel, title="Each of the strongest channels alone"),
            "each_channel",
            loaded,
            data=found.channels,
            snippet=snippets.parts(loaded, request, hook, layer, column, names),
        )
    with left:
        if estimated is None:
            st.caption("Attribution is an estimate of patches only: there is no map of channels for other changes.")
            return
        n = links.choice("rows", 16, range(4, 129))
        views.show(
            channel_map(estimated, n),
            "channels",
            loaded,
            data=estimated,
            snippet=snippets.attribution(loaded, request, hook, (layer, column)),
        )
        st.slider("Channels shown", 4, min(128, estimated.sizes["channel"]), key="rows")


page()
