"""Fixtures of all tests, and the checking of every annotated shape by jaxtyping and beartype."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from jaxtyping import config, install_import_hook

# Triton decides when a kernel is defined whether it is to be interpreted, so before the first import of the packages.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Before that import too: only modules imported after this are checked.
install_import_hook(["ssminterp", "ssminterp_kernels"], "beartype.beartype")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from quick_interpreter import quicken_interpreter

    quicken_interpreter()

# Tiny tensors gain nothing from threads, and lose much where several processes share two cores: those of the tests, and
# the notebooks and apps that they start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Few examples and no deadline: the machines that run the suite have two cores, which others share.
settings.register_profile("ssminterp", max_examples=12, deadline=None, derandomize=True)
settings.load_profile("ssminterp")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Annotations unchecked, as outside the tests: what a caller's mistake meets is the package's own error."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
