"""What the server's process runs: `python -m ssminterp_dashboards.serve --server.port=8501 …`.

The slow imports come before the server answers, and so does a bundled model, so that the first page need not wait for
them. Other models may take minutes: the page says that they are being loaded.
"""

from __future__ import annotations

import logging
import sys

import streamlit.web.cli

import ssminterp.patching
import ssminterp.plots
import ssminterp.tasks
from ssminterp.checkpoints import BUNDLED
from ssminterp_dashboards.launch import APP

# Imported for their time: the pages need them at once.
READY = (ssminterp.patching, ssminterp.plots, ssminterp.tasks)


def prepare() -> None:
    """Load the model that the app starts with, if it is a bundled one, into the cache that the pages use."""
    # Streamlit warns that its caches are made before its server, which is the point.
    logging.getLogger("streamlit.runtime.caching").setLevel(logging.ERROR)
    from ssminterp_dashboards import models

    name = models.started_with() or BUNDLED[0]
    if name in BUNDLED:
        models.load(models.ModelKey(name, device=models.device()))


if __name__ == "__main__":
    prepare()
    streamlit.web.cli.main(["run", str(APP), *sys.argv[1:]])
