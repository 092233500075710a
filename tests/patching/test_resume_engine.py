"""The resuming engine gives the numbers of the naive one, whatever is swept."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssminterp import HookedMamba
from ssminterp.interventions import ablate, freeze, knockout, patch, scale, steer
from ssminterp.patching import patch_sweep
from ssminterp_kernels import rows
from tests.patching.sweep_cases import HOOKS, assert_equal_sweeps, both_engines, last_logit, metric_at
from tests.tiny_models import hooked, random_tokens


@pytest.fixture(scope="module")
def model() -> HookedMamba:
    return hooked(num_hidden_layers=2)


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return random_tokens(3, 7, seed=1), random_tokens(3, 7, seed=2)


@pytest.fixture(params=["compiled", "torch"])
def stages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute a layer: in float32 on the CPU, and on any device in any dtype."""
    if request.param == "torch":
        monkeypatch.setattr(rows, "suits", lambda *tensors, d_inner: False)
    return str(request.param)


def test_the_stages_are_those_asked_for(model: HookedMamba, stages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = ("normed", "conv_silu", "scanned_rows", "forked_rows")
    called = set()

    def counted(name: str, loop: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            called.add(name)
            return loop(*arguments)

        return call

    for name in loops:
        monkeypatch.setattr(rows, name, counted(name, getattr(rows, name)))
    tokens = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    patch_sweep(model, *tokens, ["resid_pre", "state"], last_logit, progress=False)
    assert called == (set(loops) if stages == "compiled" else set())


@pytest.mark.parametrize("family", ["mamba", "falcon"])
@pytest.mark.parametrize("direction", ["clean_to_corrupted", "corrupted_to_clean"])
def test_every_hook_at_every_layer_and_position(
    family: str, pair: tuple[torch.Tensor, torch.Tensor], direction: str
) -> None:
    model = hooked(family, num_hidden_layers=2)
    resumed, naive = both_engines(model, *pair, HOOKS, last_logit, direction=direction)
    assert_equal_sweeps(resumed, naive)
    base = resumed.attrs["corrupted" if direction == "clean_to_corrupted" else "clean"]
    assert all(float(abs(resumed.sel(hook=hook).mean("example") - base).max()) > 1e-3 for hook in HOOKS)


@pytest.mark.parametrize("hooks", ["state", ["A_bar", "x"], "conv_taps"])
def test_a_metric_that_says_where_it_reads(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor], hooks: str | list[str]
) -> None:
    assert_equal_sweeps(*both_engines(model, *pair, hooks, metric_at([6, 2, 4])))


@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize("max_batch", [None, 20])
def test_changes_of_one_position_only_in_one_pass_and_in_several(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor], max_batch: int | None
) -> None:
    options = {"positions": [0, 3, 6], "intervention": lambda now, other: now - 2 * other, "max_batch": max_batch}
    assert_equal_sweeps(*both_engines(model, *pair, HOOKS, last_logit, positions=[0, 3, 6], max_batch=max_batch))
    assert_equal_sweeps(*both_engines(model, *pair, ["C", "mixer_out", "x"], metric_at([6, 2, 4]), **options))


@pytest.mark.usefixtures("stages")
def test_roles_at_different_positions(model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    roles = {"first": torch.tensor([0, 0, 0]), "here": torch.tensor([0, 3, 6]), "there": torch.tensor([5, 6, 1])}
    assert_equal_sweeps(*both_engines(model, *pair, HOOKS, metric_at([6, 6, 5]), positions=roles))


def test_several_metrics_at_once(model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    apart = {"early": metric_at([2, 3, 1]), "late": metric_at([6, 5, 6])}
    opaque = {"late": metric_at([6, 5, 6]), "sum": lambda logits: logits[:, 2:, 4].sum(1)}
    for metrics in (apart, opaque):
        assert_equal_sweeps(*both_engines(model, *pair, ["state", "resid_pre", "C"], metrics))


@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize("intervention", ["zero", "mean", lambda now, other: 0.5 * now - 2.0 * other.abs()])
def test_every_intervention(model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor], intervention: object) -> None:
    roles = {"here": torch.tensor([0, 3, 6])}
    options = {"intervention": intervention, "positions": roles}
    assert_equal_sweeps(*both_engines(model, *pair, HOOKS, last_logit, **options))


@pytest.mark.parametrize("family", ["patch", "steer", "scale", "ablate", "freeze", "subspace"])
def test_intervention_objects_move_over_the_grid(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor], family: str
) -> None:
    """The resuming engine against `model.intervene` in every cell."""
    basis = torch.linalg.qr(torch.randn(model.cfg.d_inner, 2)).Q
    other = random_tokens(3, 7, seed=5)
    cache = model.run_with_cache(other, "*")[1]
    intervention = {
        "patch": patch("*", torch.randn(3, 1, 1), channels=[0, 2]),
        "steer": steer("*", torch.randn(3, 1, 1), strength=0.5, batch=[0, 2]),
        "scale": scale("*", -0.5),
        "ablate": ablate("*", method="mean", prompts=other),
        "freeze": freeze("*", cache),
        "subspace": patch("*", cache, basis=basis),
    }[family]
    hooks = {
        "patch": ["in_x", "delta", "gate"],
        "steer": ["resid_pre", "x", "C", "y"],
        "subspace": ["x", "gate", "state"],
    }.get(family, ["resid_pre", "mixer_in", "x", "B", "A_bar", "state", "C", "y"])
    roles = {"here": torch.tensor([0, 3, 6]), "there": torch.tensor([4, 2, 1])}
    resumed, naive = both_engines(model, *pair, hooks, last_logit, positions=roles, intervention=intervention)
    assert_equal_sweeps(resumed, naive)
    changed = abs(resumed - resumed["corrupted_by_example"]).max(("position", "example"))
    assert float(changed.min()) > 1e-5
    grouped = both_engines(
        model, *pair, ["x", "gate"], last_logit, positions=roles, intervention=intervention, channels={"few": [0, 1]}
    )
    assert_equal_sweeps(*grouped)


@pytest.mark.parametrize("engine", ["resume", "naive"])
@pytest.mark.usefixtures("as_users_run_it")
def test_interventions_that_cannot_be_moved_are_refused(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor], engine: str
) -> None:
    for intervention, message in (
        (scale("*", 2.0, positions=3), "has positions of its own"),
        (scale("*hook_delta", 2.0), "is not for blocks.0.mixer.hook_x"),
        (steer("*", torch.randn(3, 1, 5)), "does not fit"),
        (knockout(sources=[1]), "cannot move it"),
        ("scale", "intervention must be"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_sweep(model, *pair, "x", last_logit, intervention=intervention, engine=engine, progress=False)


@pytest.mark.parametrize("intervention", ["patch", "zero", lambda now, other: now - other])
def test_channels_and_state_coordinates(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor], intervention: object
) -> None:
    options = {"positions": [3], "layers": [1], "intervention": intervention}
    groups = {"first": [0], "some": [1, 5, -1]}
    inner = ["conv_taps", "delta", "A_bar", "state"]
    assert_equal_sweeps(*both_engines(model, *pair, inner, last_logit, channels=groups, **options))
    assert_equal_sweeps(*both_engines(model, *pair, ["resid_pre"], last_logit, channels="each", **options))
    of_states = ["B", "C", "B_bar", "state"]
    assert_equal_sweeps(*both_engines(model, *pair, of_states, last_logit, states="each", **options))
    both = {"channels": groups, "states": {"last": 3, "others": [0, 1, 2]}}
    resumed, naive = both_engines(model, *pair, ["state", "B_bar"], last_logit, **both, **options)
    assert resumed.dims == ("hook", "layer", "position", "channel", "coordinate", "example")
    assert_equal_sweeps(resumed, naive)


@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    hooks=st.lists(st.sampled_from(HOOKS), min_size=1, max_size=4, unique=True),
    max_batch=st.one_of(st.none(), st.integers(2, 9)),
    data=st.data(),
)
def test_random_prompts_roles_and_limits(
    seed: int, batch: int, length: int, hooks: list[str], max_batch: int | None, data: st.DataObject
) -> None:
    model = hooked("mamba", seed=seed % 3, conv_kernel=data.draw(st.sampled_from([2, 4])))
    clean, corrupted = random_tokens(batch, length, seed), random_tokens(batch, length, seed + 1)
    shared = data.draw(st.integers(0, length))
    clean[:, :shared] = corrupted[:, :shared]
    places = st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch)
    roles = {name: torch.tensor(data.draw(places)) for name in ("one", "two")}
    layers = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    metric = metric_at(data.draw(places))
    options = {"positions": roles, "layers": layers, "max_batch": max_batch}
    assert_equal_sweeps(*both_engines(model, clean, corrupted, hooks, metric, **options))


def test_a_small_memory_limit_cuts_the_sweep_and_not_its_numbers(
    pair: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hooked()
    options = {"positions": None, "max_bytes": 3_000_000}
    assert_equal_sweeps(*both_engines(model, *pair, ["state", "x"], last_logit, **options))
    with pytest.raises(ValueError, match=r"GB are allowed: raise max_bytes="):
        patch_sweep(model, *pair, "state", last_logit, max_bytes=10_000, progress=False)


def test_hooks_that_are_attached_act_in_the_naive_engine_and_are_refused_by_the_other(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    model = hooked()
    with model.hooks([("blocks.1.mixer.hook_x", lambda tensor, hook: tensor * 0.5)]):
        sweep = patch_sweep(model, *pair, "x", last_logit, progress=False)
        assert sweep.attrs["engine"] == "naive"
        with pytest.raises(ValueError, match=r"attached at blocks\.1\.mixer\.hook_x.*engine='naive'"):
            patch_sweep(model, *pair, "x", last_logit, engine="resume", progress=False)
    without = patch_sweep(model, *pair, "x", last_logit, progress=False)
    assert without.attrs["engine"] == "resume"
    assert float(abs(sweep - without).max()) > 1e-4


def test_an_error_in_the_middle_leaves_the_model_as_it_was(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = hooked()
    before = model(pair[0])

    def fails(now: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("stop")

    for hook in ("x", "state"):
        with pytest.raises(RuntimeError, match="stop"):
            patch_sweep(model, *pair, hook, last_logit, intervention=fails, progress=False)
    assert not any(point.is_listened_to for point in model.hook_points.values())
    assert torch.equal(model(pair[0]), before)
