"""Analyses that a state space model makes exact: what a token writes, how long it lives, where it is read."""

from ssminterp.analysis.answers import intervened_answers, likely_pair
from ssminterp.analysis.contributions import hidden_attention, token_contributions
from ssminterp.analysis.conv import conv_contributions, patch_taps
from ssminterp.analysis.direct import (
    attribute_to_channels,
    attribute_to_layers,
    attribute_to_sources,
    logit_direction,
)
from ssminterp.analysis.flow import flow_contributions
from ssminterp.analysis.flow_graph import edge_table, flow_graph, strongest_paths
from ssminterp.analysis.flow_patching import flow_patches
from ssminterp.analysis.knockouts import knockout_sweep
from ssminterp.analysis.lenses import lens_summary, logit_lens, state_lens, top_tokens
from ssminterp.analysis.memory import (
    half_lives,
    horizons,
    rank_channels,
    sinks,
    spectrum,
    state_shares,
    step_sizes,
    survival,
)
from ssminterp.analysis.names import token_averages
from ssminterp.analysis.probes import class_direction, probe
from ssminterp.analysis.states import compare_states, state_norms, state_words, states_at
from ssminterp.analysis.substitution import substitution_test

__all__ = [
    "attribute_to_channels",
    "attribute_to_layers",
    "attribute_to_sources",
    "class_direction",
    "compare_states",
    "conv_contributions",
    "edge_table",
    "flow_contributions",
    "flow_graph",
    "flow_patches",
    "half_lives",
    "hidden_attention",
    "horizons",
    "intervened_answers",
    "knockout_sweep",
    "lens_summary",
    "likely_pair",
    "logit_direction",
    "logit_lens",
    "patch_taps",
    "probe",
    "rank_channels",
    "sinks",
    "spectrum",
    "state_lens",
    "state_norms",
    "state_shares",
    "state_words",
    "states_at",
    "step_sizes",
    "strongest_paths",
    "substitution_test",
    "survival",
    "token_averages",
    "token_contributions",
    "top_tokens",
]
