"""Sweeps: what happens to the answer when one hook of one run is put into another, everywhere in turn."""

from ssminterp.patching.attribution import attribution_patch
from ssminterp.patching.cells import Steered, cell_change, cell_logits, changed_tokens, strongest_channels
from ssminterp.patching.columns import Column, position_columns, role_columns
from ssminterp.patching.edges import edge_attribution, strongest_edges
from ssminterp.patching.effects import compare_with_exact
from ssminterp.patching.layers import ablate_layers, remove_layers, restore_layers
from ssminterp.patching.metrics import Metric
from ssminterp.patching.paths import path_patch
from ssminterp.patching.results import strongest
from ssminterp.patching.sweep import patch_sweep

__all__ = [
    "Column",
    "Metric",
    "Steered",
    "ablate_layers",
    "attribution_patch",
    "cell_change",
    "cell_logits",
    "changed_tokens",
    "compare_with_exact",
    "edge_attribution",
    "patch_sweep",
    "path_patch",
    "position_columns",
    "remove_layers",
    "restore_layers",
    "role_columns",
    "strongest",
    "strongest_channels",
    "strongest_edges",
]
