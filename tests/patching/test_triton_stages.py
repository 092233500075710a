"""Sweeps by the Triton kernels: on a GPU as they are, elsewhere in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from ssminterp.models.hook_points import HookPoint
from ssminterp.patching import compiled_stages, joint_pass, patch_sweep, resume
from ssminterp.patching.sites import BY_STAGES, Places, Wanted, collect
from ssminterp.patching.stage_runs import values_by_stages
from tests.patching.sweep_cases import HOOKS, assert_equal_sweeps, both_engines, last_logit, metric_at
from tests.tiny_models import hooked, random_tokens

ROLES = {"here": torch.tensor([0, 3]), "there": torch.tensor([3, 1])}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["joint", "apart"])
def pair(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two prompts for sweeps by Triton, whose rows go through the layers together with the runs, or after them."""
    monkeypatch.setattr(compiled_stages, "takes_triton", lambda weight: True)
    joint, ran = resume.suits_a_joint_pass, joint_pass.run_jointly
    monkeypatch.setattr(resume, "suits_a_joint_pass", lambda sweep: request.param == "joint" and joint(sweep))
    calls: list[bool] = []
    monkeypatch.setattr(joint_pass, "run_jointly", lambda *arguments: (calls.append(True), ran(*arguments))[1])
    yield random_tokens(2, 4, seed=1).to(DEVICE), random_tokens(2, 4, seed=2).to(DEVICE)
    assert bool(calls) == (request.param == "joint")


# Those whose values recorders alone can see are swept apart from the others.
@pytest.mark.parametrize(
    ("family", "hooks"),
    [("mamba", [hook for hook in HOOKS if hook in BY_STAGES]), ("falcon", ["resid_pre", "x", "state"])],
)
def test_the_numbers_are_those_of_the_naive_engine(
    family: str, hooks: list[str], pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = hooked(family, num_hidden_layers=2).to(DEVICE)
    assert_equal_sweeps(*both_engines(model, *pair, hooks, metric_at([3, 2]), positions=ROLES))


def test_rows_that_part_in_every_layer(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """From the whole residual stream, at their sites alone, and from the state on; one norm is called as a module."""
    model = hooked(num_hidden_layers=3).to(DEVICE)
    model.blocks[1].norm.register_forward_hook(lambda module, arguments, output: output)
    hooks = ["resid_pre", "state", "C", "delta"]
    assert_equal_sweeps(*both_engines(model, *pair, hooks, metric_at([3, 2]), positions=[1]))


@pytest.mark.parametrize("pair", ["joint"], indirect=True)
@pytest.mark.parametrize(
    ("family", "hooks"), [("mamba", ["state"]), ("mamba", ["delta", "B"]), ("falcon", ["resid_pre", "delta"])], ids=str
)
def test_patches_that_the_scan_itself_makes(
    family: str, hooks: list[str], pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = hooked(family, num_hidden_layers=2).to(DEVICE)
    assert_equal_sweeps(*both_engines(model, *pair, hooks, metric_at([3, 1]), positions=[0, 1]))


@pytest.mark.parametrize("pair", ["joint"], indirect=True)
def test_changes_that_stay_at_their_sites_in_the_last_layer(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Of which one is read at its site, and one behind it."""
    model = hooked(num_hidden_layers=2).to(DEVICE)
    assert_equal_sweeps(*both_engines(model, *pair, ["C", "resid_post"], metric_at([1, 3]), positions=[1], layers=[1]))


def test_hooks_that_only_recorders_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_stages, "takes_triton", lambda weight: True)
    model = hooked(num_hidden_layers=2).to(DEVICE)
    tokens = random_tokens(1, 3, seed=1).to(DEVICE), random_tokens(1, 3, seed=2).to(DEVICE)
    hooks = [hook for hook in HOOKS if hook not in BY_STAGES]
    assert_equal_sweeps(*both_engines(model, *tokens, hooks, metric_at([2]), positions=[1]))


def test_what_is_no_patch_and_a_metric_that_reads_anywhere(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = hooked(num_hidden_layers=2).to(DEVICE)
    options = {"positions": [2], "intervention": lambda now, other: 0.5 * now - other}
    hooks = ["resid_pre", "x", "delta", "state", "C"]
    assert_equal_sweeps(*both_engines(model, *pair, hooks, last_logit, **options))
    groups = {"channels": {"some": [1, 5]}, "max_batch": 5, "positions": [1, 2]}
    assert_equal_sweeps(*both_engines(model, *pair, ["delta", "state"], last_logit, **groups))


@pytest.mark.parametrize("pair", ["joint"], indirect=True)
def test_the_bar_tells_what_is_launched_for_the_first_time(
    pair: tuple[torch.Tensor, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    model = hooked(num_hidden_layers=2, hidden_size=48, state_size=3).to(DEVICE)
    patch_sweep(model, *pair, ["state"], metric_at([3, 2]), positions=[1])
    shown = capsys.readouterr().err
    assert "patching: both runs:   0%" in shown
    assert "patching: first launch of joint_scan_kernel:   0%" in shown
    assert shown.rstrip().splitlines()[-1].split("\r")[-1].startswith("patching: 100%")


@pytest.mark.parametrize("family", ["mamba", "falcon"])
def test_values_of_whole_runs_are_those_that_recorders_see(family: str) -> None:
    model = hooked(family, num_hidden_layers=2).to(DEVICE)
    tokens = random_tokens(4, 6).to(DEVICE)
    every = [
        Places(torch.tensor([0, 1, 2, 3, 3]), torch.tensor([-1, 0, 2, 5, 5])),
        Places(torch.tensor([2, 3]), torch.tensor([1, 2])),
        Places(torch.tensor([0, 2, 3]), torch.tensor([-1, 1, 4])),
    ]
    points: list[HookPoint] = [model.hook_points[name] for name in model.hook_names("blocks.*")]
    wanted = [Wanted(point, places) for point in points if point.spec.short in BY_STAGES for places in every]
    assert len(wanted) == 2 * len(every) * len(BY_STAGES)
    with torch.no_grad():
        # In spans, which only recorders take.
        seen = collect(model, tokens, wanted, span=4)
        told = values_by_stages(model, tokens, wanted)
    for (point, _), expected, got in zip(wanted, seen, told, strict=True):
        assert expected is not None
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4, msg=point.name)


@pytest.mark.gpu
@pytest.mark.parametrize("hook", HOOKS)
def test_a_gpu_gives_the_numbers_of_the_naive_engine(hook: str) -> None:
    model = hooked(num_hidden_layers=3, hidden_size=64).cuda()
    tokens = random_tokens(3, 7, seed=1).cuda(), random_tokens(3, 7, seed=2).cuda()
    assert_equal_sweeps(*both_engines(model, *tokens, [hook], last_logit))
    assert_equal_sweeps(*both_engines(model, *tokens, [hook], metric_at([6, 2, 4]), max_batch=40))


@pytest.mark.gpu
def test_half_precision_on_a_gpu_comes_close() -> None:
    model = hooked(num_hidden_layers=3, hidden_size=64).cuda()
    tokens = random_tokens(3, 7, seed=1).cuda(), random_tokens(3, 7, seed=2).cuda()
    hooks = ["resid_pre", "delta", "state", "C"]
    exact = patch_sweep(model, *tokens, hooks, last_logit, progress=False)
    half = patch_sweep(model.to(torch.bfloat16), *tokens, hooks, last_logit, progress=False)
    assert float(abs(half - exact).max()) < 0.05 * float(exact.max() - exact.min())
