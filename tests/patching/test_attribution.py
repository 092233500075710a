"""Attributions are gradients times differences: equal to slopes, to exact patches where those are linear, and to what
is known of a planted circuit."""

from types import MethodType

import pytest
import torch
from planted import NAME_A, NAME_B, answer, planted_circuit
from tiny_models import FAMILIES, hooked, random_tokens
from torch import Tensor, nn
from xarray import DataArray

from ssminterp import HookedMamba, patch
from ssminterp.patching import attribution as attribution_module
from ssminterp.patching import attribution_patch, patch_sweep, strongest

HOOKS = ["resid_pre", "mixer_in", "mixer_out", "resid_post", "in_x", "gate", "conv_taps", "conv", "x", "delta"]
HOOKS += ["B", "C", "A_bar", "B_bar", "state", "y", "ssm_out", "gated"]
BATCH, LENGTH = 2, 6
CLEAN, CORRUPTED = random_tokens(BATCH, LENGTH, seed=1), random_tokens(BATCH, LENGTH, seed=2)


def last_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HookedMamba:
    return hooked(request.param)


def values(array: DataArray) -> Tensor:
    return torch.from_numpy(array.values)


def in_float64(model: HookedMamba) -> HookedMamba:
    """Norms and residual stream too, which Hugging Face computes in float32 whatever the weights are."""

    def rms_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
        return norm.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    model = model.double()
    for block in model.blocks:
        block.residual_in_fp32 = False
    for norm in [*(block.norm for block in model.blocks), model.lm.backbone.norm_f]:
        norm.forward = MethodType(rms_norm, norm)
    return model


def slope_of_a_patch(model: HookedMamba, name: str, position: int, step: float = 1e-3) -> Tensor:
    """d metric / d amount of a patch that goes part of the way from the corrupted run's value to the clean one's."""
    clean, corrupted = (model.run_with_cache(tokens, name)[1][name][:, position] for tokens in (CLEAN, CORRUPTED))

    def at(amount: float) -> Tensor:
        # Logits are rounded to float32 too.
        with model.intervene(patch(name, corrupted.lerp(clean, amount), positions=position)):
            final = model.run_with_cache(CORRUPTED, "hook_final_norm")[1]["final_norm"]
        return last_logit(final @ model.lm.lm_head.weight.T)

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_attributions_are_the_slopes_of_patches(model: HookedMamba, hook: str) -> None:
    model = in_float64(model)
    attributed = attribution_patch(model, CLEAN, CORRUPTED, hook, last_logit, reduce=None)
    assert abs(attributed).max() > 1e-2
    for layer, position in [(0, 1), (1, LENGTH - 1), (2, LENGTH - 1)]:
        name = next(n for n in model.hook_names(f"blocks.{layer}.*") if n.endswith(f"hook_{hook}"))
        expected = slope_of_a_patch(model, name, position)
        got = values(attributed.sel(hook=hook, layer=layer).isel(position=position))
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=3e-4)


def test_they_equal_exact_patches_where_the_metric_is_linear() -> None:
    """In the last layer without a final norm, what these hooks hold goes to the logits linearly."""
    model = hooked()
    model.lm.backbone.norm_f = nn.Identity()
    hooks = ["B", "C", "A_bar", "B_bar", "state", "y", "ssm_out", "gated", "mixer_out", "resid_post"]
    for direction in ("clean_to_corrupted", "corrupted_to_clean"):
        arguments = {"metric": last_logit, "layers": [2], "positions": [1, 5], "direction": direction}
        exact = patch_sweep(model, CLEAN, CORRUPTED, hooks, engine="naive", progress=False, **arguments)
        attributed = attribution_patch(model, CLEAN, CORRUPTED, hooks, **arguments)
        base = exact.attrs["corrupted" if direction == "clean_to_corrupted" else "clean"]
        assert attributed.attrs["baseline"] == pytest.approx(base, abs=1e-5)
        assert abs(exact - base).max() > 0.1
        torch.testing.assert_close(values(attributed), values(exact - base), atol=1e-4, rtol=1e-3)


def near_pair(model: HookedMamba, difference: float) -> tuple[Tensor, Tensor]:
    """Clean and corrupted prompts with two different tokens at one place, whose embeddings are made to lie near."""
    embeddings = model.lm.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[7] = embeddings[5] + difference * torch.randn_like(embeddings[5])
    clean, corrupted = CORRUPTED.clone(), CORRUPTED.clone()
    clean[:, 2], corrupted[:, 2] = 5, 7
    return clean, corrupted


def test_they_agree_with_exact_patches_of_small_differences(model: HookedMamba) -> None:
    clean, corrupted = near_pair(model, 0.01)
    arguments = {"hooks": HOOKS, "metric": last_logit, "positions": [2, LENGTH - 1]}
    exact = patch_sweep(model, clean, corrupted, engine="naive", progress=False, **arguments)
    attributed = attribution_patch(model, clean, corrupted, **arguments)
    change = exact - exact.attrs["corrupted"]
    assert abs(change).max() > 1e-3
    assert abs(change - attributed).max() < 0.05 * abs(change).max()
    large = abs(change).values > 0.1 * abs(change).max().item()
    assert ((change.values > 0) == (attributed.values > 0))[large].all()


@pytest.mark.parametrize("place", [{}, {"layer": 2, "channel": 9, "coordinate": 3, "delay": 2}, {"layer": 0}], ids=str)
@pytest.mark.parametrize("steps", [None, 4])
def test_a_planted_circuit_is_found_at_its_channel_and_coordinate(place: dict, steps: int | None) -> None:
    circuit = planted_circuit(**place)
    name_at, length = 2, 9
    clean, corrupted = circuit.prompt(NAME_A, name_at, length), circuit.prompt(NAME_B, name_at, length)
    effects = attribution_patch(circuit.model, clean, corrupted, "state", answer, by="state", steps=steps)
    effects = effects.squeeze("hook")
    for position in range(length):
        here = effects.isel(position=position)
        if position < name_at + circuit.delay:
            assert abs(here.sel(layer=circuit.layer)).max() < 1e-6
            continue
        found = here.stack(place=("layer", "channel", "coordinate"))
        order = abs(found).argsort().values[::-1]
        assert found["place"].values[order[0]] == (circuit.layer, str(circuit.channel), str(circuit.coordinate))
        assert abs(found[order[1]]) < 0.2 * abs(found[order[0]])
        assert found[order[0]] > 0


def test_a_planted_circuit_is_found_along_its_route() -> None:
    """What reads the name matters where it stands, what carries and reads it later; the strongest cells are these."""
    circuit = planted_circuit()
    name_at, length = 2, 9
    clean, corrupted = circuit.prompt(NAME_A, name_at, length), circuit.prompt(NAME_B, name_at, length)
    effects = attribution_patch(circuit.model, clean, corrupted, ["B", "x", "state", "y"], answer)
    table = strongest(effects, n=1, hooks=["B"])
    assert (table["layer"][0], table["position"][0][0]) == (circuit.layer, str(name_at))
    assert strongest(effects, n=1, hooks=["y"])["position"][0][0] == str(length - 1)
    carriers = strongest(effects, n=length - name_at, hooks=["state"])
    assert set(carriers["layer"]) == {circuit.layer}
    assert sorted(int(label.split()[0]) for label in carriers["position"]) == list(range(name_at, length))


@pytest.mark.parametrize(
    ("by", "hooks"),
    [
        ("channel", ["state", "x", "conv_taps", "B_bar"]),
        ("channel", ["resid_pre", "mixer_out"]),
        ("state", ["state", "A_bar"]),
        ("state", ["B", "C"]),
    ],
)
def test_parts_sum_to_the_whole(model: HookedMamba, by: str, hooks: list[str]) -> None:
    whole = attribution_patch(model, CLEAN, CORRUPTED, hooks, last_logit, reduce=None)
    parts = attribution_patch(model, CLEAN, CORRUPTED, hooks, last_logit, reduce=None, by=by)
    kept = [dim for dim in parts.dims if dim in ("channel", "coordinate")]
    assert kept
    torch.testing.assert_close(values(parts.sum(kept)), values(whole), atol=1e-5, rtol=1e-4)
    mean = attribution_patch(model, CLEAN, CORRUPTED, hooks, last_logit, by=by)
    torch.testing.assert_close(values(mean), values(parts.mean("example")))


def test_parts_are_those_of_the_exact_sweep() -> None:
    """Labels and numbers of single channels and coordinates, in the linear case."""
    model = hooked()
    model.lm.backbone.norm_f = nn.Identity()
    arguments = {"hooks": "state", "metric": last_logit, "layers": [2], "positions": [4]}
    exact = patch_sweep(
        model, CLEAN, CORRUPTED, channels="each", states="each", engine="naive", progress=False, **arguments
    )
    attributed = attribution_patch(model, CLEAN, CORRUPTED, by="state", **arguments)
    assert attributed.dims == exact.dims
    difference = exact - exact.attrs["corrupted"] - attributed
    assert difference.shape == exact.shape, "the labels differ"
    assert abs(difference).max() < 1e-4
    assert abs(attributed).max() > 1e-2


def test_roles_are_taken_at_each_examples_own_position(model: HookedMamba) -> None:
    at = torch.tensor([4, 1])
    by_role = attribution_patch(model, CLEAN, CORRUPTED, ["state", "B"], last_logit, positions={"r": at}, reduce=None)
    everywhere = attribution_patch(model, CLEAN, CORRUPTED, ["state", "B"], last_logit, reduce=None)
    assert by_role["position"].values.tolist() == ["r"]
    for example, position in enumerate(at.tolist()):
        torch.testing.assert_close(
            values(by_role.isel(position=0, example=example)),
            values(everywhere.isel(position=position, example=example)),
        )


@pytest.mark.parametrize("steps", [None, 3])
def test_the_other_direction_is_the_other_pair(model: HookedMamba, steps: int | None) -> None:
    arguments = {"hooks": ["state", "x"], "metric": last_logit, "steps": steps}
    there = attribution_patch(model, CLEAN, CORRUPTED, direction="corrupted_to_clean", **arguments)
    swapped = attribution_patch(model, CORRUPTED, CLEAN, **arguments)
    torch.testing.assert_close(values(there), values(swapped))
    assert there.attrs["clean"] == swapped.attrs["corrupted"] == 0
    assert there.attrs["corrupted"] == pytest.approx(swapped.attrs["clean"])


def test_integrated_gradients_are_complete_at_the_input(model: HookedMamba) -> None:
    """Sundararajan et al. 2017, proposition 1; the midpoint rule comes nearer the more steps it takes."""
    clean, corrupted = near_pair(model, 0.5)
    errors = []
    for steps in (None, 2, 32):
        effects = attribution_patch(model, clean, corrupted, "resid_pre", last_logit, [0], steps=steps, reduce=None)
        total = effects["clean_by_example"]
        errors.append(float(abs(effects.sum(["hook", "layer", "position"]) - total).max() / abs(total).max()))
    assert errors[2] < 0.01 < min(errors[:2])


def test_it_takes_two_forwards_and_leaves_the_model_as_it_was(model: HookedMamba) -> None:
    forwards: list[bool] = []
    handle = model.lm.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    with torch.no_grad():
        attribution_patch(model, CLEAN, CORRUPTED, HOOKS, last_logit)
    handle.remove()
    assert forwards == [False, True]
    assert not any(point.is_listened_to for point in model.hook_points.values())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_groups_of_layers_give_the_same(model: HookedMamba, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = attribution_patch(model, CLEAN, CORRUPTED, ["state", "x"], last_logit)
    monkeypatch.setattr(attribution_module, "free_bytes", lambda device: 0)
    forwards: list[None] = []
    handle = model.lm.register_forward_hook(lambda *_: forwards.append(None))
    in_groups = attribution_patch(model, CLEAN, CORRUPTED, ["state", "x"], last_logit)
    handle.remove()
    assert len(forwards) == 2 * model.cfg.n_layers
    torch.testing.assert_close(values(in_groups), values(at_once))


@pytest.mark.parametrize("by", ["position", "channel"])
@pytest.mark.parametrize("hooks", [["state"], ["state", "y", "x"]])
def test_states_contracted_in_their_scans_give_the_same(
    model: HookedMamba, by: str, hooks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of CUDA, here by the kernel's torch reference."""
    arguments = {"hooks": hooks, "metric": last_logit, "by": by, "layers": [0, 2], "positions": [1, 3, 5]}
    by_edits = attribution_patch(model, CLEAN, CORRUPTED, reduce=None, **arguments)
    monkeypatch.setattr(attribution_module, "_states_by_scan", lambda task: True)
    by_scan = attribution_patch(model, CLEAN, CORRUPTED, reduce=None, **arguments)
    assert abs(by_scan.sel(hook="state")).max() > 0.01
    torch.testing.assert_close(values(by_scan), values(by_edits), atol=1e-5, rtol=1e-4)
    assert not any(point.is_listened_to for point in model.hook_points.values())


@pytest.mark.parametrize("by_scan", [False, True])
@pytest.mark.parametrize("reduce", ["mean", None])
def test_runs_made_together_give_the_same(
    model: HookedMamba, by_scan: bool, reduce: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of short runs on CUDA; what is attached keeps them apart."""
    monkeypatch.setattr(attribution_module, "_states_by_scan", lambda task: by_scan)
    arguments = {"hooks": ["state", "x", "gate", "resid_post"], "metric": last_logit, "reduce": reduce}
    apart = attribution_patch(model, CLEAN, CORRUPTED, **arguments)
    monkeypatch.setattr(attribution_module, "_runs_together", lambda task: True)
    forwards: list[int] = []
    handle = model.lm.backbone.register_forward_hook(lambda module, tokens, _: forwards.append(1))
    together = attribution_patch(model, CLEAN, CORRUPTED, **arguments)
    handle.remove()
    assert len(forwards) == 1
    torch.testing.assert_close(values(together), values(apart), atol=1e-5, rtol=1e-4)
    assert together.attrs["clean"] == pytest.approx(apart.attrs["clean"], abs=1e-5)
    assert together.attrs["baseline"] == pytest.approx(apart.attrs["baseline"], abs=1e-5)
    assert all(point.is_idle for point in model.hook_points.values())


def test_states_behind_what_interventions_hold_fast(model: HookedMamba, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an intervention puts constants, no graph leads further back, but later states count all the same."""
    arguments = {"hooks": ["state", "x", "resid_pre"], "metric": last_logit, "reduce": None}
    with model.intervene(patch("*hook_mixer_in", 0.5)):
        by_edits = attribution_patch(model, CLEAN, CORRUPTED, **arguments)
        assert abs(by_edits).max() > 0
        monkeypatch.setattr(attribution_module, "_states_by_scan", lambda task: True)
        by_scan = attribution_patch(model, CLEAN, CORRUPTED, **arguments)
    torch.testing.assert_close(values(by_scan), values(by_edits), atol=1e-5, rtol=1e-4)
    with model.intervene(patch("blocks.1.hook_resid_pre", 0.5)):
        by_scan = attribution_patch(model, CLEAN, CORRUPTED, **arguments)
        monkeypatch.undo()
        by_edits = attribution_patch(model, CLEAN, CORRUPTED, **arguments)
    torch.testing.assert_close(values(by_scan), values(by_edits), atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("hooks", [["state"], HOOKS])
def test_a_gpu_gives_what_the_cpu_gives(model: HookedMamba, hooks: list[str]) -> None:
    expected = attribution_patch(model, CLEAN, CORRUPTED, hooks, last_logit)
    got = attribution_patch(model.cuda(), CLEAN, CORRUPTED, hooks, last_logit)
    torch.testing.assert_close(values(got), values(expected), atol=1e-3, rtol=1e-3)


def test_interventions_that_are_attached_hold_in_both_runs(model: HookedMamba) -> None:
    """With Δ frozen to zero everywhere, no state moves and none can matter."""
    with model.intervene(patch("*hook_delta", 0.0)):
        effects = attribution_patch(model, CLEAN, CORRUPTED, ["state", "resid_pre"], last_logit)
    assert abs(effects.sel(hook="state")).max() == 0
    assert abs(effects.sel(hook="resid_pre")).max() > 0.01


def test_inference_mode_and_bfloat16() -> None:
    model = hooked().to(torch.bfloat16)
    with torch.inference_mode():
        effects = attribution_patch(model, CLEAN, CORRUPTED, HOOKS, last_logit)
    assert abs(effects).max() > 0.01
    assert effects.dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hooks": "stat"}, "short name 'stat'"),
        ({"hooks": []}, "hooks is empty"),
        ({"hooks": "logits"}, "belong to no layer"),
        ({"layers": [9]}, r"layers \[9\] do not exist"),
        ({"layers": []}, "at least one layer"),
        ({"positions": [9]}, r"positions \[9\] are out of range"),
        ({"positions": {}}, "no roles"),
        ({"corrupted": CORRUPTED[:, :-1]}, r"\[2, 6\] and \[2, 5\]"),
        ({"metric": lambda logits: logits.mean()}, "one number per example"),
        ({"metric": lambda logits: logits[:, 0, 0] * float("nan")}, "NaN"),
        ({"metric": lambda logits: (logits[:, -1].argmax(-1) == 3).float()}, "has no gradient"),
        ({"metric": {"one": last_logit, "other": last_logit}}, "one metric"),
        ({"reduce": "sum"}, "reduce must be"),
        ({"direction": "sideways"}, "direction must be"),
        ({"by": "neuron"}, "by must be"),
        ({"by": "channel", "hooks": ["x", "B"]}, r"\['B'\] do not have"),
        ({"by": "state", "hooks": ["state", "x"]}, r"\['x'\] do not have"),
        ({"by": "channel", "hooks": ["x", "resid_pre"]}, "different axes"),
        ({"by": "state", "hooks": ["state", "B"]}, "different axes"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 2.5}, "steps must be"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_refused_and_leaves_the_model_alone(arguments: dict[str, object], message: str) -> None:
    model = hooked()
    call = {"corrupted": CORRUPTED, "hooks": "x", "metric": last_logit} | arguments
    with pytest.raises(ValueError, match=message):
        attribution_patch(model, CLEAN, **call)
    assert not any(point.is_listened_to for point in model.hook_points.values())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        attribution_patch(hooked(), CLEAN, CORRUPTED, "x", lambda logits: (logits[:, -1, 0] * 0).abs().sqrt())
