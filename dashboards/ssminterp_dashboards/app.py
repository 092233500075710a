"""The dashboards: `ssminterp dashboard`, or `make dashboard`.

Conventions of every page:

- A page is a file in `screens/` (Streamlit makes pages of its own of a folder called pages), listed in `PAGES`: a
  function `page()`, called on the last line. It holds widgets and calls; numbers come from `ssminterp.analysis`,
  `patching` and `tasks`, figures from `ssminterp.plots`.
- The model and the prompt are chosen above the page (`header`). `models.current()` is the loaded model; run it only
  inside `with models.current().ready() as model:`, because all tabs share it, and hooks must not meet other runs.
- Results are cached by functions under `@st.cache_data` whose arguments say everything: `key: ModelKey` first (it is
  hashable and holds name, revision, dtype and device), then prompt, hook and options. They return arrays, never a
  model, and get the model by `models.load(key).ready()`. See `results.py`.
- A heavy panel is a function under `@panel`: a fragment, and whatever goes wrong in it becomes a message.
- Every choice is a widget with a `key`, after `links.choice(key, default, options)`, which gives the value, seeds it
  from the link and writes it there. Keys are unique over all pages (prefix them, `state_layer`, unless pages share the
  choice). To change a choice from code, set `st.session_state[key]` in a callback.
- Show figures with `views.show`, which themes them, adds the model, its revision and dtype, the snippet and the
  downloads. Text from prompts goes through `text.plain` before any markdown; never `unsafe_allow_html`.
- Tests open a page with `open_page` of `tests/dashboards/dashboard_app.py`; see `test_prompt_page.py` there.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from ssminterp_dashboards import header
from ssminterp_dashboards.errors import guarded

HERE = Path(__file__).parent

# file in screens/, title, icon, what the page needs above it
PAGES = (
    ("prompt", "Prompt", ":material/chat:", ("model", "prompt")),
    ("state", "State", ":material/memory:", ("model", "prompt")),
    ("patch", "Patch", ":material/grid_on:", ("model",)),
    ("flow", "Flow", ":material/account_tree:", ("model", "prompt")),
    ("memory", "Memory", ":material/hourglass_top:", ("model",)),
    ("learn", "Learn", ":material/school:", ()),
)


def main() -> None:
    """Everything above the page, and the page."""
    st.set_page_config(page_title="ssminterp", page_icon=(HERE / "icon.svg").read_text(encoding="utf-8"), layout="wide")
    pages = {
        name: st.Page(HERE / "screens" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "prompt")
        for name, title, icon, _ in PAGES
    }
    chosen = st.navigation(list(pages.values()), position="top")
    (name,) = [name for name, page in pages.items() if page == chosen]
    needs = next(needs for page, _, _, needs in PAGES if page == name)
    header.style()
    with guarded():
        if header.show(chosen.title, needs):
            chosen.run()


main()
