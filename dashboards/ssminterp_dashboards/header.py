"""What stands above every page: its title, the model, and the prompt on pages that are about one."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from ssminterp_dashboards import links, models
from ssminterp_dashboards.text import plain, size

PURPOSE = {
    "Prompt": "What does the model say next, and after which layer does it know?",
    "State": "What does a layer's state hold, for how long, and whose is it?",
    "Patch": "Put a piece of one run into another: which piece carries the answer?",
    "Flow": "Which token tells which, through which layer?",
    "Memory": "How long does each channel remember, and can a memory be moved?",
    "Learn": "The recurrence by hand, one step at a time.",
}
DEFAULT_PROMPT = "Then, Shelby and Emma had fun at the school. Shelby gave an apple to"
# Streamlit's own classes for keyed containers; no text of a user is ever in here.
STYLE = """<style>
.stMainBlockContainer { max-width: 1360px; padding-left: 2.2rem; padding-right: 2.2rem }
.st-key-title h1 { padding: 0 0 .2rem 0; line-height: 1.15 }
.st-key-title [data-testid="stCaptionContainer"] { font-size: .95rem; margin-top: .5rem }
.st-key-masthead { border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); padding-bottom: .7rem }
[data-testid="stPlotlyChart"] { border-radius: .4rem }
:focus-visible { outline: 2px solid var(--primary-color, #0b6e66); outline-offset: 2px }
</style>"""


def style() -> None:
    """The few rules that Streamlit's theme options do not reach."""
    st.html(STYLE)


def show(title: str, needs: Sequence[str]) -> bool:
    """Title, model and prompt. False if the page cannot be shown yet, and the reader has been told why."""
    with st.container(key="masthead", horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
        with st.container(key="title", gap="xxsmall"):
            st.title(title, anchor=False)
            st.caption(PURPOSE.get(title, ""))
        ready = _choose_model() if "model" in needs else True
    links.choice("prompt", DEFAULT_PROMPT)
    return ready and (ask_prompt() if "prompt" in needs else True)


def ask_prompt() -> bool:
    """The prompt that pages share. False if it is empty, and the reader has been told what to do."""
    prompt = links.choice("prompt", DEFAULT_PROMPT)
    st.text_input(
        "Prompt",
        key="prompt",
        placeholder="Type a sentence for the model to go on from",
        help="Press Enter to run it. The bundled models know only the words of their tasks.",
    )
    if not (prompt or "").strip():
        st.info("Type a prompt above, or pick one from a task on the page **Prompt**.", icon=":material/edit:")
        return False
    return True


def _choose_model() -> bool:
    """The model's popover. False if there is no model to show a page for."""
    names = models.choices()
    chosen = links.choice("model", names[0])
    links.choice("dtype", "float32", models.DTYPES)
    links.choice("revision", "")
    with st.popover(plain(chosen), icon=":material/deployed_code:"):
        st.selectbox(
            "Model",
            names if chosen in names else [*names, chosen],
            key="model",
            format_func=models.label,
            accept_new_options=True,
            help="Type owner/model for any other Mamba on the Hugging Face hub.",
        )
        st.segmented_control("Precision", list(models.DTYPES), key="dtype", required=True)
        st.text_input("Revision", key="revision", placeholder="a branch, tag or commit of the hub")
        name = st.session_state["model"]
        models.allowed(name)
        about = st.empty()
    if models.needs_download(name) and not _may_download(name):
        return False
    loaded = models.current()
    about.caption(_about(loaded))
    return True


def _about(loaded: models.Loaded) -> str:
    """Sizes, memory and the check of a model, as markdown."""
    cfg = loaded.model.cfg
    return (
        f"{cfg.architecture}: {cfg.n_layers} layers, d\\_model {cfg.d_model}, d\\_inner {cfg.d_inner}, "
        f"d\\_state {cfg.d_state}  \n{loaded.n_parameters:,} parameters, {size(loaded.n_bytes)} of memory on "
        f"{loaded.model.device.type}, loaded in {loaded.seconds:.1f} s  \n:material/check: its logits equal plain "
        "transformers' (checked when loaded)"
    )


def _may_download(name: str) -> bool:
    """A link must not start a download by itself: the reader does."""
    agreed = st.session_state.setdefault("downloads", set())
    if name in agreed:
        return True
    st.warning(f"{plain(name)} is not on this machine.", icon=":material/download:")
    if st.button("Download it from the Hugging Face hub", type="primary"):
        agreed.add(name)
        return True
    return False
