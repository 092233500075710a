"""Knockout on a CUDA device forbids what it forbids on the CPU."""

import pytest
import torch

from ssminterp import knockout, patch
from tests.tiny_models import hooked, random_tokens


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mamba", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives(family: str, dtype: torch.dtype) -> None:
    on_cpu, on_gpu = hooked(family), hooked(family).to("cuda", dtype)
    tokens, roles = random_tokens(3, 70), {"end": torch.tensor([69, 40, 55])}
    cuts = [
        knockout([0, 2], sources=[3, 20], targets="end"),
        knockout(1, sources=slice(5, 9), decay="skipped", channels=[1, 3], states=[0, 2]),
        patch("blocks.2.mixer.hook_state", 0.5, positions=30),
    ]
    logits = []
    for model in (on_cpu, on_gpu):
        with torch.no_grad(), model.intervene(*cuts, roles=roles):
            logits.append(model(tokens).float().cpu())
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert error < (1e-4 if dtype == torch.float32 else 5e-2)
    with torch.no_grad():
        assert not torch.allclose(on_cpu(tokens), logits[0], atol=1e-2)
