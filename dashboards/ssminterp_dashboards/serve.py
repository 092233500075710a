"""What the server's process runs: `python -m ssminterp_dashboards.serve --server.port=8501 …`.

The slow imports come before the server answers, so that the first page need not wait for them.
"""

from __future__ import annotations

import sys

import streamlit.web.cli
from transformers import MambaForCausalLM

import ssminterp.patching
import ssminterp.plots
import ssminterp.tasks
from ssminterp_dashboards.launch import APP

# Imported for their time: app.py needs them at once.
READY = (MambaForCausalLM, ssminterp.patching, ssminterp.plots, ssminterp.tasks)

if __name__ == "__main__":
    streamlit.web.cli.main(["run", str(APP), *sys.argv[1:]])
