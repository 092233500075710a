"""Edges weighted by patches: against patches made by hand, other tools of the package, and the planted route."""

import numpy as np
import pytest
import torch
from brute_force import contributions, quantities
from planted import NAME_A, NAME_B, answer, planted_circuit
from tiny_models import hooked, random_tokens
from torch import Tensor
from torch.nn.functional import silu

from ssminterp.analysis import flow_graph, flow_patches, patch_taps
from ssminterp.patching import patch_sweep

LENGTH = 6


def third(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


def pair() -> tuple[Tensor, Tensor]:
    clean = random_tokens(2, LENGTH, 1)
    corrupted = clean.clone()
    corrupted[:, 1:4] = random_tokens(2, 3, 2)
    return clean, corrupted


@pytest.mark.parametrize("family", ["mamba", "falcon"])
def test_taps_and_nodes_are_what_other_sweeps_find(family: str) -> None:
    model, (clean, corrupted) = hooked(family), pair()
    flow = flow_patches(model, clean, corrupted, third, max_rows=7, progress=False)
    start = flow_patches(model, clean, corrupted, third, progress=False)
    np.testing.assert_allclose(flow["state"], start["state"], atol=1e-5)
    base = third(model(corrupted)).detach().numpy()
    np.testing.assert_allclose(flow["total"], third(model(clean)).detach().numpy() - base, atol=1e-5)
    taps = patch_taps(model, clean, corrupted, third, reduce=None, progress=False)
    found = taps.transpose("example", "layer", "position", "back").values - base[:, None, None, None]
    np.testing.assert_allclose(flow["conv"], found, atol=1e-4)
    sweep = patch_sweep(model, clean, corrupted, ["resid_pre", "resid_post"], third, reduce=None, progress=False)
    patched = sweep.transpose("example", "hook", "layer", "position").values - base[:, None, None, None]
    np.testing.assert_allclose(flow["node"][:, :-1], patched[:, 0], atol=1e-4)
    np.testing.assert_allclose(flow["node"][:, -1], patched[:, 1, -1], atol=1e-4)


@torch.no_grad()
def test_edges_of_the_state_are_changes_of_the_mixers_output_at_one_token() -> None:
    model, (clean, corrupted) = hooked(), pair()
    flow = flow_patches(model, clean, corrupted, third, progress=False)
    caches = [model.run_with_cache(tokens)[1] for tokens in (clean, corrupted)]
    base = third(model(corrupted))
    for layer in range(3):
        source, now = (contributions(quantities(model, cache, layer))["y"] for cache in caches)
        D = model.blocks[layer].mixer.D
        out = model.blocks[layer].mixer.out_proj
        gate = silu(caches[1]["gate", layer])
        for t, s in ((5, 2), (4, 3), (3, 3), (5, 5)):
            change = (source - now)[:, t, s].float()
            skipped = D * (caches[0]["x", layer] - caches[1]["x", layer])[:, t]
            for added, found in ((change, flow["state"][:, layer, t, s]), (skipped, flow["skip"][:, layer, t])):
                vector = out(added * gate[:, t])

                def add(tensor: Tensor, hook: object, vector: Tensor = vector, t: int = t) -> Tensor:
                    tensor[:, t] += vector
                    return tensor

                moved = third(model.run_with_hooks(corrupted, [(f"blocks.{layer}.hook_mixer_out", add)])) - base
                np.testing.assert_allclose(found, moved, atol=1e-4)
        change = caches[0]["resid_pre", layer] - caches[1]["resid_pre", layer]

        def bypass(tensor: Tensor, hook: object, change: Tensor = change) -> Tensor:
            tensor[:, 2] += change[:, 2]
            return tensor

        moved = third(model.run_with_hooks(corrupted, [(f"blocks.{layer}.hook_resid_post", bypass)])) - base
        np.testing.assert_allclose(flow["residual"][:, layer, 2], moved, atol=1e-4)


@pytest.mark.parametrize("delay", [0, 2])
def test_the_planted_route_is_found_and_nothing_else(delay: int) -> None:
    circuit = planted_circuit(delay=delay)
    sides = [circuit.prompt(name, 3, 14) for name in (NAME_A, NAME_B)]
    flow = flow_patches(circuit.model, *sides, answer, progress=False)
    edges = list(flow_graph(flow, 0.2).edges(data=True))
    moves = {(e["kind"], e["layer"], e["source"], e["target"]) for *_, e in edges if e["kind"] != "residual"}
    assert moves == {("conv", circuit.layer, 3, 3 + delay), ("state", circuit.layer, 3 + delay, 13)}
    assert {(e["layer"], e["source"]) for *_, e in edges if e["kind"] == "residual"} == {(0, 3), (2, 13)}
    assert all(e["share"] == pytest.approx(1.0, abs=0.05) for *_, e in edges)
    assert flow.attrs["end"] == ""


def test_equal_runs_have_nothing_to_patch() -> None:
    model, (clean, _) = hooked(), pair()
    flow = flow_patches(model, clean, clean, third, progress=False)
    assert all(
        float(np.abs(flow[name]).max()) == 0.0 for name in ("residual", "conv", "state", "skip", "node", "total")
    )
    with pytest.raises(ValueError, match=r"total is 0\.0"):
        flow_graph(flow.isel(batch=0))


def test_bad_input_is_named(as_users_run_it: None) -> None:
    model, (clean, corrupted) = hooked(), pair()
    with pytest.raises(ValueError, match="must have the same shape"):
        flow_patches(model, clean, corrupted[:, 1:], third)
    with pytest.raises(ValueError, match="pass one metric"):
        flow_patches(model, clean, corrupted, {"a": third, "b": third})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one number per example"):
        flow_patches(model, clean, corrupted, lambda logits: logits[:, -1], progress=False)
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        flow_patches(model, clean, corrupted, third, max_rows=0)
    with (
        model.hooks(fwd_hooks=[("*hook_x", lambda tensor, hook: None)]),
        pytest.raises(ValueError, match="hooks are attached"),
    ):
        flow_patches(model, clean, corrupted, third)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    model, (clean, corrupted) = hooked(), pair()
    expected = flow_patches(model, clean, corrupted, third, progress=False)
    found = flow_patches(model.to("cuda"), clean, corrupted, third, progress=False)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-3)
