"""More edits than tiles, which the Triton scan applies anywhere in a tile rather than begin a tile with each."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from scan_cases import (  # noqa: E402
    OPTIONAL,
    ScanCase,
    check_against_reference,
    check_inputs_against_reference,
    random_scan_inputs,
)
from triton_cases import check_chunks, forget_launches, tensors_of  # noqa: E402

from ssminterp_kernels.selective_scan import StateEdits, selective_scan, triton_scan  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
BF16, F16 = torch.bfloat16, torch.float16

SMALL_CASES = (
    ScanCase(length=18, d_inner=3, d_state=16, edit_positions=tuple(range(18)), states=None),
    ScanCase(length=19, d_inner=3, d_state=5, edit_positions=((0, 1, 15, 18), (7, 8, 9, 17)), states=None),
    ScanCase(length=5, d_inner=4, n_groups=2, dtype=F16, edit_positions=(1, 3, 4), states=(), strided=True),
    ScanCase(length=9, d_inner=33, d_state=3, optional=(), edit_positions=(0, 1, 8), states=None, dtype=BF16),
    ScanCase(length=4, edit_positions=((0, 3), (1, 2)), optional=("z",), delta_softplus=False, states=None),
)

GPU_CASES = (
    *(
        ScanCase(
            length=length, d_inner=d_inner, d_state=16, dtype=dtype, edit_positions=tuple(range(length)), states=None
        )
        for length, d_inner in ((70, 192), (320, 70))
        for dtype in (torch.float32, BF16)
    ),
    ScanCase(length=40, batch=8, d_inner=2048, d_state=16, edit_positions=tuple(range(0, 40, 3)), states=None),
    ScanCase(batch=100, length=17, d_inner=512, d_state=16, edit_positions=(2, 3, 9, 10, 16), states=None),
    ScanCase(
        length=260, d_inner=70, d_state=8, edit_positions=(tuple(range(130)), tuple(range(130, 260))), states=None
    ),
    *(
        ScanCase(
            length=40,
            d_inner=96,
            d_state=16,
            n_groups=2,
            optional=optional,
            strided=True,
            edit_positions=tuple(range(40)),
            states=None,
        )
        for optional in (OPTIONAL, ())
    ),
)


@pytest.fixture
def edited_inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of every launch of the forward kernel, whether it was told to edit anywhere in a tile."""
    told: list[bool] = []
    launch = triton_scan.launch

    def listening(kernel: object, *arguments: object, **options: object) -> None:
        if kernel is triton_scan.scan_forward_kernel:
            told.append(bool(options["INSIDE"]))
        launch(kernel, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_scan, "launch", listening)
    forget_launches()
    yield told
    forget_launches()


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_small_cases_equal_the_reference(case: ScanCase, edited_inside: list[bool]) -> None:
    check_against_reference(case, "triton", device=DEVICE)
    assert edited_inside == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_outputs_and_gradients_equal_the_reference(case: ScanCase) -> None:
    check_against_reference(case, "triton", device=DEVICE)


@pytest.mark.parametrize(
    ("kept", "added"),
    [("one number", "states"), ("numbers", "numbers"), ("states", "numbers"), ("states", "states")],
)
def test_numbers_and_whole_states_of_programs_of_several_elements(
    kept: str, added: str, edited_inside: list[bool]
) -> None:
    """So many elements that a program has two of them; each begins with its own first edit."""
    batch, n_edits = 3000 if HAS_GPU else 20, 3
    shapes = {"one number": (1, 1, 1), "numbers": (n_edits, 1, 1), "states": (n_edits, 2, 16)}
    inputs = random_scan_inputs(ScanCase(batch=batch, length=9, d_inner=2, d_state=16, states=None), device=DEVICE)
    keep = torch.rand(1, *shapes[kept], device=DEVICE, requires_grad=True)
    add = torch.randn(batch, *shapes[added], device=DEVICE, requires_grad=True)
    assert triton_scan.forward_plan(tensors_of(inputs)).elements > 1
    positions = torch.tensor([[1, 6, 8], [0, 1, 2], [3, 7, 8], [6, 7, 8]]).repeat(batch // 4, 1)
    inputs["edits"] = StateEdits(positions, keep, add)
    check_inputs_against_reference(inputs, "triton")
    both_are_states = kept == added == "states"
    assert edited_inside == [not both_are_states], "two states an edit leave no registers to load them ahead"


@pytest.mark.parametrize("step", [1, 3])
def test_chunks_equal_one_pass(step: int, edited_inside: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    edits = tuple(range(2, 61, step))
    case = ScanCase(length=61, batch=1, d_inner=2, d_state=3, edit_positions=edits, states=())
    check_chunks(case, 16, DEVICE, monkeypatch, every=8)
    assert edited_inside == [True, True]


def test_states_set_at_every_position_alone_determine_the_output(edited_inside: list[bool]) -> None:
    """keep = 0 forgets all that was read: y is what C reads of the states given, and the last of them is final."""
    case = ScanCase(length=13, d_inner=3, d_state=4, optional=(), edit_positions=tuple(range(13)), states=None)
    inputs = random_scan_inputs(case, device=DEVICE)
    states = torch.randn(2, 13, 3, 4, device=DEVICE)
    inputs["edits"] = StateEdits(case.edit_positions, torch.zeros(1, 1, 1, 1, device=DEVICE), states)  # type: ignore[arg-type]
    with torch.no_grad():
        out = selective_scan(**inputs, backend="triton")
        torch.testing.assert_close(out.y, torch.einsum("bpdn,bpn->bpd", states, inputs["C"]))
    assert torch.equal(out.final_state, states[:, -1])
    assert edited_inside == [True]
