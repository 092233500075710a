"""Plotly figures, one function each, drawn from labelled arrays."""

from ssminterp.plots.attribution import attribution_bars, attribution_heatmap
from ssminterp.plots.cartridges import answer_bars, recall_lines, state_distance_heatmap
from ssminterp.plots.cells import clickable
from ssminterp.plots.contributions import contribution_heatmap, strongest_part
from ssminterp.plots.conv import conv_heatmap, tap_heatmap
from ssminterp.plots.directions import probe_curves, substitution_curves
from ssminterp.plots.drilldown import changed_tokens_figure, channel_map, parts_bars
from ssminterp.plots.flow import flow_figure
from ssminterp.plots.knockouts import knockout_curves
from ssminterp.plots.layers import layer_curves, share_bars
from ssminterp.plots.learn import forgetting_figure, held_at_the_end, state_map, state_steps, three_ways
from ssminterp.plots.lenses import lens_heatmap, prediction_bars
from ssminterp.plots.memory import half_life_heatmap, horizon_heatmap, spectrum_figure, step_heatmap, survival_curves
from ssminterp.plots.patching import patching_heatmap, strongest_columns
from ssminterp.plots.report import save_report
from ssminterp.plots.states import compare_curves, norm_curve, norm_heatmap, state_heatmap, state_words_figure
from ssminterp.plots.theme import save_html

__all__ = [
    "answer_bars",
    "attribution_bars",
    "attribution_heatmap",
    "changed_tokens_figure",
    "channel_map",
    "clickable",
    "compare_curves",
    "contribution_heatmap",
    "conv_heatmap",
    "flow_figure",
    "forgetting_figure",
    "half_life_heatmap",
    "held_at_the_end",
    "horizon_heatmap",
    "knockout_curves",
    "layer_curves",
    "lens_heatmap",
    "norm_curve",
    "norm_heatmap",
    "parts_bars",
    "patching_heatmap",
    "prediction_bars",
    "probe_curves",
    "recall_lines",
    "save_html",
    "save_report",
    "share_bars",
    "spectrum_figure",
    "state_distance_heatmap",
    "state_heatmap",
    "state_map",
    "state_steps",
    "state_words_figure",
    "step_heatmap",
    "strongest_columns",
    "strongest_part",
    "substitution_curves",
    "survival_curves",
    "tap_heatmap",
    "three_ways",
]
