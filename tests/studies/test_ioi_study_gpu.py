"""The study on a GPU, where plotly need not be."""

import numpy as np
import pytest

from ssminterp import HookedMamba
from ssminterp.studies import ioi_study


@pytest.mark.gpu
@pytest.mark.timeout(900)  # it compiles the scan in many variants
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    studies = [
        ioi_study(HookedMamba.from_pretrained("nano-mamba", device=device), 4, progress=False)
        for device in ("cpu", "cuda")
    ]
    for part in ("zero", "resample", "conv", "alike", "knockouts", "sites", "taps", "flow", "patched_flow"):
        one, other = (getattr(study, part) for study in studies)
        for name in one if hasattr(one, "data_vars") else [None]:
            a, b = (values if name is None else values[name] for values in (one, other))
            np.testing.assert_allclose(b, a, rtol=0.02, atol=0.02 * max(1.0, float(np.abs(a).max())))
