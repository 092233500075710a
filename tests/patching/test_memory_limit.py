"""A sweep keeps to the memory that it is given."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ssminterp.patching import patch_sweep
from tests.patching.sweep_cases import metric_at
from tests.tiny_models import hooked, random_tokens

PAIRS, LENGTH = 4, 32


def peak_bytes(**options: Any) -> int:
    """The most bytes of tensors that are alive at once during a sweep, beside those from before."""
    model = hooked(num_hidden_layers=2, hidden_size=32, state_size=16)
    clean, corrupted = (random_tokens(PAIRS, LENGTH, seed=seed) for seed in (1, 2))
    metric = metric_at([LENGTH - 1] * PAIRS)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        patch_sweep(model, clean, corrupted, metric=metric, engine="resume", progress=False, **options)
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    "options",
    [
        {"hooks": ["state", "resid_pre"]},
        {"hooks": ["x", "C", "mixer_out"]},
        {"hooks": ["A_bar", "B_bar", "conv_taps"]},
        {"hooks": ["state"], "layers": [1], "positions": [3, 20], "channels": "each"},
        {"hooks": ["delta"], "intervention": "mean"},
    ],
    ids=str,
)
def test_the_limit_is_kept(options: dict[str, Any]) -> None:
    limit = 3_000_000
    assert peak_bytes(max_bytes=limit, **options) <= limit
    torch.manual_seed(0)
    assert peak_bytes(max_bytes=10**9, **options) > limit, "a limit that nothing would pass tests nothing"
