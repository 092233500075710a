"""Contributions of the flow's edges: conservation at every node, cut edges, the planted route."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import NAME_A, NAME_B, answer, planted_circuit
from tiny_models import hooked, random_tokens
from torch import Tensor

from ssminterp import HookedMamba, ablate
from ssminterp.analysis import attribute_to_sources, flow_contributions, flow_graph

CONFIGS = [{}, {"use_bias": True}, {"use_conv_bias": False}]


@given(st.sampled_from(["mamba", "falcon"]), st.sampled_from(CONFIGS), st.integers(1, 12), st.integers(0, 5))
def test_what_enters_a_node_leaves_it(family: str, config: dict[str, bool], length: int, seed: int) -> None:
    model, tokens = hooked(family, seed, **config), random_tokens(2, length, seed)
    flow = flow_contributions(model, tokens, 3, 4)
    node, residual, conv = (flow[name].values for name in ("node", "residual", "conv"))
    state, skip, bias = (flow[name].values for name in ("state", "skip", "bias"))
    out_bias = model.blocks[0].mixer.out_proj.bias
    into_x = conv.sum(-1)
    out_of_conv = np.zeros_like(residual)
    for back in range(min(conv.shape[-1], length)):
        out_of_conv[:, :, : length - back] += conv[:, :, back:, back]
    from_x = state.sum(2) + skip
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(residual + out_of_conv, node[:, :-1], **close)
    if out_bias is None:
        np.testing.assert_allclose(residual + state.sum(3) + skip, node[:, 1:], **close)
    if out_bias is None and not config.get("use_conv_bias", True):
        np.testing.assert_allclose(into_x, from_x, **close)
        np.testing.assert_allclose(bias, 0.0, atol=1e-6)
    # Whatever the biases: what they add is what the nodes gain.
    np.testing.assert_allclose(node[:, 1:].sum(2) - node[:, :-1].sum(2), bias.sum(2), **close)
    logits = model(tokens)[:, -1].detach()
    np.testing.assert_allclose(flow["total"], logits[:, 3] - logits[:, 4], **close)
    np.testing.assert_allclose(node[:, -1].sum(1), flow["total"], **close)
    np.testing.assert_allclose(np.triu(state, 1), 0.0)


def test_the_last_layer_is_the_direct_attribution() -> None:
    model, tokens = hooked(), random_tokens(2, 9)
    flow = flow_contributions(model, tokens, [3, 5], [4, 6], position=-2).isel(layer=-1)
    direct = attribute_to_sources(model, tokens, [3, 5], [4, 6], layers=2, targets=-2, sources=list(range(8)))
    of_state = flow["state"].values[:, -2].copy()
    of_state[:, -2] += flow["skip"].values[:, -2]
    np.testing.assert_allclose(of_state[:, :-1], direct.values[:, 0, 0], atol=1e-5)
    np.testing.assert_allclose(flow["state"].values[:, -1], 0.0)


class FrozenModel:
    """A model with what selects held at its values in one run, as plain products in float64: linear but for biases."""

    def __init__(self, model: HookedMamba, tokens: Tensor) -> None:
        logits, self.cache = model.run_with_cache(tokens)
        self.logits = logits.detach()[0, -1].double()
        self.weights = {name: value.double() for name, value in model.lm.state_dict().items()}
        self.n_layers, self.d_conv = model.cfg.n_layers, model.cfg.d_conv
        self.eps = model.lm.config.layer_norm_epsilon

    def __call__(self, kind: str = "", layer: int = -1, place: tuple[int, ...] = ()) -> Tensor:
        """The last position's logits with one edge cut."""
        resid = self.cache["embed"][0].double()
        for i in range(self.n_layers):
            resid = self._layer(resid, i, kind if i == layer else "", place)
        return (resid * self._scale(f"blocks.{self.n_layers - 1}.hook_resid_post"))[-1] @ (
            self.weights["lm_head.weight"] * self.weights["backbone.norm_f.weight"]
        ).T

    def _scale(self, name: str) -> Tensor:
        return (self.cache[name][0].double().pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    def _layer(self, resid: Tensor, i: int, cut: str, place: tuple[int, ...]) -> Tensor:
        weights = {
            name.split(".", 3)[3]: w for name, w in self.weights.items() if name.startswith(f"backbone.layers.{i}.")
        }
        held = {name: self.cache[name, i][0].double() for name in ("delta", "B", "C", "gate", "conv")}
        length, d_inner = held["delta"].shape
        normed = resid * self._scale(f"blocks.{i}.hook_resid_pre") * weights["norm.weight"]
        in_x = normed @ weights["mixer.in_proj.weight"][:d_inner].T
        after = resid.clone()
        if cut == "residual":
            after[place[0]] = 0.0
        conv = weights["mixer.conv1d.bias"].expand(length, -1).clone()
        for t, back in product(range(length), range(self.d_conv)):
            if t >= back and (cut != "conv" or place != (t, back)):
                conv[t] += weights["mixer.conv1d.weight"][:, 0, -1 - back] * in_x[t - back]
        x = conv * torch.sigmoid(held["conv"])
        A = -weights["mixer.A_log"].exp()
        y = torch.zeros_like(x)
        for t in range(length):
            for s in range(t + 1):
                if cut != "state" or place != (t, s):
                    decay = torch.exp(A * held["delta"][s + 1 : t + 1].sum(0)[:, None])
                    y[t] += (held["C"][t] * decay * held["B"][s]).sum(-1) * held["delta"][s] * x[s]
            if cut != "skip" or place != (t,):
                y[t] += weights["mixer.D"] * x[t]
        return after + (y * torch.nn.functional.silu(held["gate"])) @ weights["mixer.out_proj.weight"].T


@torch.no_grad()
def test_cutting_an_edge_of_the_frozen_model_takes_away_its_weight() -> None:
    model, tokens = hooked(), random_tokens(1, 5)
    frozen = FrozenModel(model, tokens)
    torch.testing.assert_close(frozen(), frozen.logits, rtol=0.0, atol=1e-4)
    flow = flow_contributions(model, tokens, 3, 4).isel(batch=0)
    whole = frozen()
    for layer in range(model.cfg.n_layers):
        places = {"residual": [(2,), (4,)], "conv": [(4, 0), (3, 1), (4, 2)], "state": [(4, 1), (3, 3)], "skip": [(4,)]}
        for kind, cuts in places.items():
            for place in cuts:
                without = frozen(kind, layer, place)
                lost = float((whole - without)[3] - (whole - without)[4])
                assert float(flow[kind].values[(layer, *place)]) == pytest.approx(lost, abs=1e-4), (kind, layer, place)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_the_planted_route_is_found_and_nothing_else(delay: int) -> None:
    circuit = planted_circuit(delay=delay)
    tokens = circuit.prompt(NAME_A, 3, 14)
    flow = flow_contributions(circuit.model, tokens, NAME_A, NAME_B)
    assert flow["total"].item() == pytest.approx(float(answer(circuit.model(tokens).detach())), rel=1e-5)
    edges = flow_graph(flow, 0.2).edges(data=True)
    moves = {(e["kind"], e["layer"], e["source"], e["target"]) for *_, e in edges if e["kind"] != "residual"}
    arrives = 3 + delay
    assert moves == {("conv", circuit.layer, 3, arrives), ("state", circuit.layer, arrives, 13)}
    stays = {(e["layer"], e["source"]) for *_, e in edges if e["kind"] == "residual"}
    assert stays == {(0, 3), (2, 13)}
    assert flow["state"].values[0, circuit.layer, 13, arrives] == pytest.approx(flow["total"].item(), rel=0.05)


def test_a_changed_run_is_refused_where_it_does_not_add_up() -> None:
    model, tokens = hooked(), random_tokens(1, 6)
    for hook in ("hook_mixer_out", "mixer.hook_y", "mixer.hook_x", "mixer.hook_in_x"):
        with (
            model.intervene(ablate(f"blocks.1.{hook}", positions=[5])),
            pytest.raises(ValueError, match="hook functions"),
        ):
            flow_contributions(model, tokens, 3, 4)
    with model.intervene(ablate("blocks.1.mixer.hook_B", positions=[2])):
        flow = flow_contributions(model, tokens, 3, 4)
    np.testing.assert_array_equal(flow["state"].sel(layer=1).values[0, :, 2], 0.0)


def test_bad_input_is_named() -> None:
    model, tokens = hooked(), random_tokens(1, 6)
    with pytest.raises(ValueError, match=r"positions \[6\] are out of range"):
        flow_contributions(model, tokens, 3, 4, position=6)
    with pytest.raises(ValueError, match=r"tokens \[99\] do not exist"):
        flow_contributions(model, tokens, 99)
    with pytest.raises(ValueError, match="the cache lacks"):
        flow_contributions(model, model.run_with_cache(tokens, "*hook_x")[1], 3)
