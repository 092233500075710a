"""From a map of everything down to single coordinates: where tiny-mamba keeps the name it is about to say.

    python examples/patch_sweep.py

Sweeps several hooks over layers and roles, takes the strongest cell of the state, and sweeps on inside that cell:
every channel by itself, the strongest channels together, every state coordinate. Prints what was found and writes
out/patch_sweep/index.html.

What to expect: one layer's state carries the name, in many channels at once. The strongest of them moves the answer by
some hundredths, a third of them by nearly all there is, and coordinate 0 by more than the other fifteen. A single
channel is not "the name".
"""

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from ssminterp import HookedMamba
from ssminterp.patching import patch_sweep, strongest
from ssminterp.plots import patching_heatmap, save_report
from ssminterp.plots.theme import themed
from ssminterp.tasks import make_task

HOOKS = ["resid_pre", "mixer_out", "x", "delta", "B", "C", "state", "gate"]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
OUT = Path("out/patch_sweep")

# --- every hook, layer and role ---

torch.manual_seed(0)
model = HookedMamba.from_pretrained("tiny-mamba")
batch = make_task("ioi", model.tokenizer, n=16)
with torch.no_grad():
    metric = batch.metric("normalised_logit_diff", model(batch.clean), model(batch.corrupted))
pair = (batch.clean, batch.corrupted)
sweep = patch_sweep(model, *pair, HOOKS, metric, positions=batch.roles)
print("The strongest cells of each hook (0 = corrupted, 1 = clean):")
top_two = pd.concat([strongest(sweep, n=2, hooks=[hook]) for hook in HOOKS])
print(top_two.to_string(index=False, float_format="%.3f"))

# --- into the strongest cell of the state, before the last token: there the name is kept and not yet used ---

kept = sweep.drop_sel(position="end")
best = strongest(kept, n=1, hooks=["state"]).iloc[0]
layer, role = int(best["layer"]), str(best["position"])
cell = {"layers": [layer], "positions": {role: batch.roles[role]}}
print(f"\nInside the state of layer {layer} at {role}, which moves the answer by {best['moved']:.2f}:")

by_channel = patch_sweep(model, *pair, "state", metric, channels="each", **cell).squeeze()
order = np.argsort(-abs(by_channel.values)).tolist()
print("strongest channels:", ", ".join(f"{i} ({float(by_channel[i]):+.3f})" for i in order[:8]))

together = {str(size): order[:size] for size in SIZES} | {"all": order}
by_size = patch_sweep(model, *pair, "state", metric, channels=together, **cell).squeeze()
print("strongest channels together:", ", ".join(f"{k}: {float(v):.2f}" for k, v in zip(together, by_size, strict=True)))

groups = {"all channels": order, "strongest 64": order[:64]}
by_coordinate = patch_sweep(model, *pair, "state", metric, channels=groups, states="each", **cell).squeeze()
print(by_coordinate.to_pandas().T.to_string(float_format="%.3f"))

# --- pictures ---

place = f"state of layer {layer} at {role}"
pairs = f"{len(batch)} prompt pairs · {model.cfg.model_name} · share of the way from corrupted (0) to clean (1)"
sizes = go.Figure(go.Scatter(x=[*SIZES, len(order)], y=by_size.values, mode="lines+markers", line_color="#0072b2"))
sizes.update_xaxes(title="channels patched together, strongest first", type="log", tickvals=[*SIZES, len(order)])
sizes.update_yaxes(title="share moved", range=[-0.05, 1.1])
coordinates = go.Figure(
    [
        go.Bar(
            name=name,
            x=by_coordinate["coordinate"].values,
            y=by_coordinate.sel(channel=name).values,
            marker_color=color,
        )
        for name, color in zip(groups, ("#0072b2", "#e69f00"), strict=True)
    ]
)
coordinates.update_xaxes(title="state coordinate, patched alone", dtick=1)
coordinates.update_yaxes(title="share moved")
figures = [patching_heatmap(sweep.sel(hook=hook)) for hook in HOOKS]
figures.append(themed(sizes, f"How many channels carry the name: {place}", pairs))
figures.append(themed(coordinates, f"Which coordinates carry it: {place}", pairs))
tables = {
    "Strongest cells": strongest(sweep),
    f"Strongest channels: {place}": strongest(by_channel.expand_dims("hook")),
}
print(f"\nFigures: {save_report(OUT / 'index.html', 'From a map down to coordinates', tables, figures)}")
