"""The page Learn: the recurrence by hand, one idea a screen, first on a made-up channel and then on nano-mamba."""

from __future__ import annotations

import streamlit as st
from xarray import Dataset

from ssminterp.learn import (
    STORY,
    OneChannel,
    convolved,
    kernel,
    made_up,
    numbers,
    recurrence,
    selective_story,
    unrolled,
    with_fixed_steps,
    written_out,
)
from ssminterp.plots import forgetting_figure, held_at_the_end, state_map, state_steps, three_ways
from ssminterp_dashboards import links, models, results_state, snippets, views
from ssminterp_dashboards.errors import panel
from ssminterp_dashboards.header import DEFAULT_PROMPT
from ssminterp_dashboards.models import ModelKey
from ssminterp_dashboards.text import plain

SCREENS = ("A memory", "Forgetting", "Three ways", "Selection", "A real one")
# Of nano-mamba's first layer, the channel that adds most to Emma's logit over Shelby's in the default prompt.
REAL, CHANNEL = "nano-mamba", 25
FINDING = (
    "The second Shelby takes out what the first one wrote, and Emma is left. With Δ, B and C fixed it would write the "
    "same as the first once more."
)
NAMES_OF_NUMBERS = {
    "delta": "Δ",
    "A_bar": "A̅",
    "before": "h before",
    "kept": "A̅ h",
    "B_bar": "B̅",
    "written": "B̅ x",
    "state": "h",
    "read": "C h",
}
DELTAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
RATES = (-3.0, -2.0, -1.0, -0.7, -0.5, -0.3, -0.2, -0.1, -0.05)


def page() -> None:
    screens = range(1, len(SCREENS) + 1)
    chosen = links.choice("learn", 1, screens)
    st.segmented_control(
        "Screen",
        screens,
        format_func=lambda i: f"{i} · {SCREENS[i - 1]}",
        key="learn",
        required=True,
        label_visibility="collapsed",
    )
    (a_memory, forgetting, ways, selection, real)[chosen - 1]()
    if chosen < len(SCREENS):
        st.button(f"Next: {SCREENS[chosen]}", icon=":material/arrow_forward:", on_click=_go_to, args=(chosen + 1,))


def _go_to(screen: int) -> None:
    st.session_state["learn"] = screen


@panel
def a_memory() -> None:
    """h ← A̅ h + B̅ x, token by token."""
    st.markdown(
        "A Mamba reads one token at a time, and all that it keeps of them is a few numbers: its **state** h. "
        "Here it is one number. Each token does two things to it: **a part of the old state is kept** (times A̅), and "
        "**something of the token is written** (x times B̅). What comes out is read from the state: y = C · h."
    )
    left, right = st.columns([5, 8], gap="large")
    one = made_up()
    steps = recurrence(one)
    with left:
        t = choose_step(one, "learn_t")
        before = "nothing yet, h = 0" if t == 0 else f"h = {float(steps['before'][t, 0]):.3g}"
        st.markdown(f"Before **{plain(STORY[t][0])}** the state is {before}. The token is x = {one.x[t]:g}.")
        show_step(steps, t, 0)
        st.caption("Δ = 0.5 and A = −0.5 for now, B = C = 1. The next screen moves them.")
    with right:
        snippet = snippet_of(
            f"figure = state_steps(recurrence(one), position={t})", "state_steps", "made_up, recurrence"
        )
        views.show(state_steps(steps, t), "learn_steps", None, data=steps, snippet=snippet)


def choose_step(one: OneChannel, key: str, first: int = 0) -> int:
    """A token to stand at, with a button to the next."""
    last = len(one.labels) - 1
    t = links.choice(key, min(first, last), range(last + 1))
    st.select_slider("Token", range(last + 1), format_func=lambda i: one.labels[i], key=key)
    with st.container(horizontal=True):
        st.button(
            "Back", icon=":material/arrow_back:", key=f"{key}_back", disabled=t == 0, on_click=_move, args=(key, -1)
        )
        st.button(
            "Read the next token",
            icon=":material/arrow_forward:",
            key=f"{key}_next",
            disabled=t == last,
            on_click=_move,
            args=(key, 1),
        )
    return t


def _move(key: str, by: int) -> None:
    st.session_state[key] += by


def show_step(steps: Dataset, t: int, coordinate: int) -> None:
    """One step in numbers, and all of them on demand."""
    rows = []
    for name, (left, *equal) in written_out(steps, t, coordinate).items():
        short = name in ("A_bar", "B_bar")
        parts = [" = ".join(equal)] if short else equal
        rows += [f"{left if i == 0 else ''} &= {part}" for i, part in enumerate(parts)]
    st.latex(r"\begin{aligned}" + r" \\ ".join(rows) + r"\end{aligned}")
    with st.popover("Every number", icon=":material/table_rows:", type="tertiary"):
        st.dataframe(numbers(steps, coordinate).rename(columns=NAMES_OF_NUMBERS), width=900)


def snippet_of(code: str, plot: str, learn: str, delta: float = 0.5, A: float = -0.5) -> str:
    """The snippet of a figure of the made-up channel `one`."""
    return snippets.code(None, f"one = made_up(delta={delta}, A={A})\n{code}", learn=learn, plots=plot)


@panel
def forgetting() -> None:
    """What Δ and A do."""
    st.markdown(
        "**A** says how fast the state fades, and is learned once. **Δ**, the step size, says how far a token moves "
        "the clock on. A large Δ does two things at once: it **forgets** (A̅ = exp(Δ A) is near 0) and it **absorbs** "
        "(B̅ = Δ B is large). A small Δ keeps the state and passes the token by."
    )
    delta, A = delta_and_a()
    views.show(
        forgetting_figure(delta, A),
        "learn_forgetting",
        None,
        snippet=snippets.code(None, f"figure = forgetting_figure({delta}, {A})", plots="forgetting_figure"),
    )
    one = made_up(delta, A)
    steps = recurrence(one)
    snippet = snippet_of("figure = state_steps(recurrence(one))", "state_steps", "made_up, recurrence", delta, A)
    views.show(state_steps(steps), "learn_story", None, data=steps, snippet=snippet)


def delta_and_a() -> tuple[float, float]:
    """The sliders of the made-up channel, which screens share."""
    delta, A = links.choice("learn_delta", 0.5, DELTAS), links.choice("learn_a", -0.5, RATES)
    left, right = st.columns(2, gap="large")
    left.select_slider("Δ, the step size", DELTAS, key="learn_delta")
    right.select_slider("A, the rate of decay", RATES, key="learn_a")
    return delta, A


@panel
def ways() -> None:
    """Recurrence, unrolled sum, convolution."""
    st.markdown(
        "The same y can be computed in three ways. **Recurrence**: one state, token by token; cheap, for reading a "
        "stream. **Unrolled sum**: y is a sum of what each earlier token wrote, times what is left of it; this says "
        "*who contributes*. **Convolution**: where Δ, B and C are the same at every token, what is left depends only "
        "on how long ago it was, so one kernel K slides over the text."
    )
    delta, A = delta_and_a()
    one = made_up(delta, A)
    terms, by_steps, by_kernel = unrolled(one), recurrence(one)["y"], convolved(one)
    figure = three_ways(terms, {"recurrence": by_steps, "convolution": by_kernel})
    code = 'figure = three_ways(unrolled(one), {"recurrence": recurrence(one)["y"], "convolution": convolved(one)})'
    snippet = snippet_of(code, "three_ways", "convolved, made_up, recurrence, unrolled", delta, A)
    views.show(figure, "learn_ways", None, data=terms, snippet=snippet)
    worst = max(float(abs(by_steps - by_kernel).max()), float(abs(by_steps.values - terms.sum("source").values).max()))
    kept = ", ".join(f"{weight:.3g}" for weight in kernel(one).values)
    st.markdown(f"The kernel, from now backwards: K = {kept}.")
    st.markdown(f"Largest difference between any two of them: **{worst:.1e}**, rounding and nothing else.")


@panel
def selection() -> None:
    """What a step size per token changes."""
    st.markdown(
        "Mamba computes **Δ, B and C from the token itself**. So it can open the state for a name and shut it for all "
        "else: a large Δ at names, a small one elsewhere. The fixed channel beside it has the same Δ on average, and "
        "must treat every word alike."
    )
    at_names, elsewhere = links.choice("learn_names", 2.0, DELTAS), links.choice("learn_others", 0.05, DELTAS)
    left, right = st.columns(2, gap="large")
    left.select_slider("Δ at Mary and John", DELTAS, key="learn_names")
    right.select_slider("Δ at all other words", DELTAS, key="learn_others")
    one = selective_story(at_names, elsewhere)
    fixed = with_fixed_steps(one)
    left, right = st.columns(2, gap="large")
    names = "selective_story, unrolled, with_fixed_steps"
    begin = f"one = selective_story({at_names}, {elsewhere})\nfixed = with_fixed_steps(one)\n"
    with left:
        code = begin + 'figure = held_at_the_end({"selective": unrolled(one), "fixed": unrolled(fixed)})'
        views.show(
            held_at_the_end({"selective": unrolled(one), "fixed": unrolled(fixed)}),
            "learn_held",
            None,
            data=Dataset({"selective": unrolled(one), "fixed": unrolled(fixed)}),
            snippet=snippets.code(None, code, learn=names, plots="held_at_the_end"),
        )
    with right:
        both = {"recurrence": recurrence(one)["y"], "the fixed kernel": convolved(fixed)}
        code = (
            begin
            + 'both = {"recurrence": recurrence(one)["y"], "the fixed kernel": convolved(fixed)}\n'
            + "figure = three_ways(unrolled(one), both)"
        )
        views.show(
            three_ways(unrolled(one), both).update_layout(
                title_text="No one kernel does it any more<br><sub>made up</sub>"
            ),
            "learn_kernel",
            None,
            data=unrolled(one),
            snippet=snippets.code(None, code, learn=f"convolved, recurrence, {names}", plots="three_ways"),
        )
    off = float(abs(both["recurrence"] - both["the fixed kernel"]).max())
    if one.varies:
        st.markdown(
            f"The recurrence and the unrolled sum still agree. The convolution is off by up to **{off:.2g}**: how much "
            "is left of a token now depends on which tokens came after it, not only on how many."
        )
    else:
        st.markdown("Both Δ are the same, so nothing is selected, and the convolution is right again.")


@panel
def real() -> None:
    """A channel of nano-mamba, every number from its hooks."""
    st.markdown(
        f"The same on **{REAL}**, a trained Mamba of two layers. One of its channels has 16 numbers as its state, each "
        "with an A of its own. All that you see is what the model computes, done again by hand."
    )
    prompt = links.choice("learn_prompt", DEFAULT_PROMPT)
    st.text_input("Prompt for nano-mamba", key="learn_prompt")
    loaded = models.load(ModelKey(REAL, device=models.device()))
    cfg = loaded.model.cfg
    layer = links.choice("learn_layer", 0, range(cfg.n_layers))
    channel = links.choice("learn_channel", CHANNEL, range(cfg.d_inner))
    coordinate = links.choice("learn_n", 0, range(cfg.d_state))
    picks = st.columns([2, 2, 2, 6], vertical_alignment="bottom")
    picks[0].selectbox("Layer", range(cfg.n_layers), key="learn_layer")
    picks[1].number_input("Channel", 0, cfg.d_inner - 1, key="learn_channel")
    picks[2].selectbox("Coordinate", range(cfg.d_state), key="learn_n")
    one, y = results_state.channel(loaded.key, prompt, layer, channel)
    steps = recurrence(one)
    off = float(abs(steps["y"].values - y).max())
    begin = f"one = channel_of(model, {prompt!r}, layer={layer}, channel={channel})\n"
    left, right = st.columns([5, 8], gap="large")
    with left:
        t = choose_step(one, "learn_real_t", first=4)
        show_step(steps, t, coordinate)
        st.caption(f"By hand and by the model, y differs by at most {off:.1e} over all tokens.")
    with right:
        code = f"figure = state_map(recurrence(one), position={t})"
        snippet = snippets.code(loaded, begin + code, learn="channel_of, recurrence", plots="state_map")
        views.show(state_map(steps, t), "learn_map", loaded, data=steps, snippet=snippet)
    fixed = with_fixed_steps(one)
    both = {"as it is": unrolled(one), "Δ, B and C fixed": unrolled(fixed)}
    code = (
        'fixed = with_fixed_steps(one)\nfigure = held_at_the_end({"as it is": unrolled(one), "fixed": unrolled(fixed)})'
    )
    views.show(
        held_at_the_end(both),
        "learn_real_held",
        loaded,
        data=Dataset(both),
        snippet=snippets.code(
            loaded, begin + code, learn="channel_of, unrolled, with_fixed_steps", plots="held_at_the_end"
        ),
        note=FINDING if (prompt, layer, channel) == (DEFAULT_PROMPT, 0, CHANNEL) else "",
    )


page()
