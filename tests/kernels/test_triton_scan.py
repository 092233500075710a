"""The Triton scan against the float64 reference: compiled on a GPU, in Triton's interpreter (slow) without one."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from scan_cases import (  # noqa: E402
    CASES,
    OPTIONAL,
    ScanCase,
    check_against_reference,
    check_inputs_against_reference,
    in_float64,
    random_scan_inputs,
    reference,
    relative_error,
)
from triton_cases import check_chunks, forget_launches, tensors_of  # noqa: E402

from ssminterp_kernels.selective_scan import ScanOutput, StateEdits, selective_scan  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
gpu = pytest.mark.gpu
BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64

# Without a GPU these run in the interpreter, at about 10 ms per program and position.
SMALL_CASES = (
    ScanCase(length=1),
    ScanCase(length=7, d_inner=3, d_state=3, strided=True),
    ScanCase(length=13, batch=1, optional=(), delta_softplus=False, states=None),
    ScanCase(length=13, batch=1, d_inner=4, n_groups=2, states=(0, 12), dtype=BF16),
    ScanCase(length=11, edit_positions=(0, 3, 4, 10), states=(3, 10), dtype=F16),
    ScanCase(length=11, edit_positions=((0, 5), (5, 10)), strided=True),
    ScanCase(length=136, batch=1, d_inner=2, d_state=2, edit_positions=(5, 70, 130), states=(64, 135)),
    # so many programs that the compiler gets fewer registers, and the kernels hold fewer values
    *(
        ScanCase(batch=9, length=6, d_inner=1, d_state=d_state, edit_positions=(3, 5), states=(2, 4))
        for d_state in (2, 16)
    ),
    # whole blocks of channels: the backward pass keeps states in rows of the gradients, and its programs are in pairs
    ScanCase(length=35, batch=1, d_inner=64, d_state=16, edit_positions=(20,), states=(7,)),
    ScanCase(length=20, batch=1, d_inner=96, d_state=16, optional=("D",), states=None, dtype=F16),
    # d_state and strides that the kernels read 16 bytes at a time; edits alone, in pairs and at the end of a block
    ScanCase(length=18, d_inner=3, d_state=16, edit_positions=((0, 1, 15), (7, 8, 17)), states=(0, 9, 10)),
)
GPU_CASES = (
    *(case for case in CASES if case.dtype != F64),
    *(
        ScanCase(length=length, d_inner=96, d_state=16, dtype=dtype)
        for length in (7, 63, 1000)
        for dtype in (torch.float32, BF16)
    ),
    *(ScanCase(length=33, d_inner=40, d_state=d_state) for d_state in (1, 2, 5, 16, 31, 64, 100, 256)),
    *(ScanCase(length=1000, d_inner=70, d_state=16, optional=(name,), states=None) for name in OPTIONAL),
    ScanCase(
        length=1000, d_inner=70, d_state=16, n_groups=2, edit_positions=tuple(range(0, 1000, 37)), states=(63, 64, 999)
    ),
    ScanCase(
        length=1000, d_inner=70, d_state=8, edit_positions=(tuple(range(0, 640, 10)), tuple(range(360, 1000, 10)))
    ),
    ScanCase(length=3000, batch=1, d_inner=33, d_state=16, states=(0, 2999), strided=True, dtype=BF16),
    *(
        ScanCase(length=length, d_inner=192, d_state=16, optional=optional, dtype=dtype, edit_positions=(3, 64))
        for length in (70, 1000)
        for optional in (OPTIONAL, ("D", "initial_state"))
        for dtype in (torch.float32, BF16)
    ),
    # all states: in chunks; in one pass by programs for some, most, and more than all multiprocessors
    *(
        ScanCase(length=length, batch=batch, d_inner=d_inner, d_state=16, states="all", edit_positions=edits)
        for length, batch, d_inner in ((2500, 3, 33), (70, 1, 5120), (90, 8, 2048), (50, 16, 2048), (5, 700, 64))
        for edits in ((), (1, 4))
    ),
    ScanCase(length=70, d_inner=24, d_state=64, states="all", edit_positions=((1, 40), (3, 4))),
    *(
        ScanCase(length=length, d_inner=192, d_state=16, edit_positions=edits, states=(5, 20, 21, 22, 40, 63, 64, 69))
        for length in (70, 1000)
        for edits in ((), (5, 22, 41))
    ),
    ScanCase(length=19, batch=300, d_inner=64, d_state=16, edit_positions=(2, 9, 10), states=(7, 9, 18)),
    ScanCase(batch=70, length=16, d_inner=64, d_state=16, edit_positions=(3,)),
    # the backward pass: several elements a program, and states that are not kept
    ScanCase(batch=131, length=16, d_inner=1024, d_state=16, states=None, dtype=BF16),
    ScanCase(batch=1, length=1000, d_inner=1536, d_state=16, states=None, dtype=BF16),
    *(
        ScanCase(length=70, d_inner=256, d_state=16, n_groups=2, dtype=dtype, edit_positions=(3, 64))
        for dtype in (torch.float32, BF16)
    ),
)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_small_cases_equal_the_reference(case: ScanCase) -> None:
    check_against_reference(case, "triton", device=DEVICE)


@gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_outputs_and_gradients_equal_the_reference(case: ScanCase) -> None:
    check_against_reference(case, "triton", device=DEVICE)


ONE_NUMBER, NUMBERS, STATES = (1, 1, 1), (2, 1, 1), (2, 2, 16)  # sizes of keep [n_edits, d_inner, d_state]


@pytest.mark.parametrize(
    ("batch", "length", "positions", "sizes"),
    [
        *((1, 9, (3, 8), sizes) for sizes in (ONE_NUMBER, NUMBERS, STATES)),
        *((1, 17, (0, 8), sizes) for sizes in (ONE_NUMBER, STATES)),
        *((1, 9, (4, 5), NUMBERS), (1, 136, (64, 65), STATES)),
        # so many elements that the compiler gets fewer registers, and that a program has two of them
        *((3000 if HAS_GPU else 20, 9, (3, 8), sizes) for sizes in (ONE_NUMBER, NUMBERS, STATES)),
    ],
    ids=str,
)
def test_edits_by_numbers_and_by_whole_states(
    batch: int, length: int, positions: tuple[int, int], sizes: tuple[int, ...]
) -> None:
    """A number needs no tile, a whole state is read 16 bytes at a time; in whole tiles, shorter ones and chunks."""
    inputs = random_scan_inputs(ScanCase(batch=batch, length=length, d_inner=2, d_state=16), device=DEVICE)
    keep = torch.rand(1, *sizes, device=DEVICE, requires_grad=True)
    add = torch.randn(batch, 2, 2, 16, device=DEVICE, requires_grad=True)
    inputs["edits"] = StateEdits(positions, keep, add)
    check_inputs_against_reference(inputs, "triton")


@pytest.mark.parametrize(
    ("positions", "edits"),
    [((0, 15, 22), ()), ((5, 6, 7, 8, 20), ()), ((2, 13, 18), (4, 13)), (tuple(range(23)), (4, 13))],
    ids=str,
)
def test_states_at_some_positions_are_those_of_all(positions: tuple[int, ...], edits: tuple[int, ...]) -> None:
    """One or several in a tile, at its ends, in the last and shorter one, and where a state is edited."""
    inputs = random_scan_inputs(ScanCase(batch=2, length=23, d_inner=1, d_state=2, edit_positions=edits), device=DEVICE)
    with torch.no_grad():
        every = selective_scan(**inputs, backend="triton").states
        some = selective_scan(**inputs | {"states": positions}, backend="triton").states
    torch.testing.assert_close(some, every[:, list(positions)])


@pytest.mark.parametrize("output", ["y", "states", "final_state"])
def test_gradient_of_one_output_alone(output: str) -> None:
    check_against_reference(ScanCase(length=9, edit_positions=(3,), states=(2, 3)), "triton", (output,), device=DEVICE)


@pytest.mark.parametrize(
    ("chunk_length", "states", "edits"),
    [
        *((length, (15, 100), (3, 40, 47)) for length in (8, 16, 48)),
        *((length, "all", edits) for length in (16, 48) for edits in ((3, 40, 47), ())),
    ],
)
def test_chunks_equal_one_pass(
    chunk_length: int,
    states: tuple[int, ...] | str,
    edits: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = ScanCase(length=101, batch=1, d_inner=2, d_state=3, edit_positions=edits, states=states)  # type: ignore[arg-type]
    check_chunks(case, chunk_length, DEVICE, monkeypatch, held=10 if states == "all" and not edits else 0)


@pytest.mark.parametrize("n_processors", [1, 2, 4, 132])
@pytest.mark.parametrize(("edits", "d_state"), [((), 4), ((5, 33), 4), (((5, 33), (7, 9)), 64)], ids=str)
def test_all_states_are_the_same_as_planned_for_any_gpu(
    n_processors: int, edits: tuple[int, ...], d_state: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssminterp_kernels.selective_scan import triton_scan

    monkeypatch.setattr(triton_scan, "processor_count", lambda device: n_processors)
    forget_launches()
    with torch.no_grad():
        inputs = random_scan_inputs(
            ScanCase(length=38, d_inner=5, d_state=d_state, edit_positions=edits), device=DEVICE
        )
        ours = selective_scan(**inputs, backend="triton")
        expected = reference(**in_float64(inputs))
    forget_launches()
    for name, value in expected.items():
        assert relative_error(getattr(ours, name), value) < 1e-5, name


def test_backward_of_a_part_of_the_batch_needs_to_be_foreseen() -> None:
    from ssminterp_kernels.selective_scan import triton_gradients, triton_scan

    case = ScanCase(length=60, batch=2 if not HAS_GPU else 200, d_inner=2, d_state=2, states=None)
    inputs = random_scan_inputs(case, device=DEVICE)
    part = case.batch // 2
    of_part = inputs | {
        name: value[:part] for name, value in inputs.items() if name in ("x", "delta", "z", "B", "C", "initial_state")
    }
    whole, half = (tensors_of(given) for given in (inputs, of_part))
    y, _, _, of_all = triton_scan.scan_forward(whole, save=True)
    _, _, _, of_half = triton_scan.scan_forward(whole, save=True, batch=part)
    expected = triton_gradients.scan_backward(half, triton_scan.scan_forward(half, save=True)[3], y[:part], None, None)
    assert of_all is not None
    assert of_half is not None
    ours = triton_gradients.scan_backward(half, of_half[:part], y[:part], None, None)
    for name, gradient in expected.items():
        assert (gradient is None) == (ours[name] is None)
        assert gradient is None or relative_error(ours[name], gradient) <= 1e-5, name
    with pytest.raises(ValueError, match="tell scan_forward of the batch"):
        triton_gradients.scan_backward(half, of_all[:part, :-1], y[:part], None, None)


@pytest.mark.parametrize("states", ["all", (0, 2)])
def test_programs_of_several_batch_elements(states: tuple[int, ...] | str) -> None:
    """Each element begins with its own state and its own first edit."""
    from ssminterp_kernels.selective_scan import triton_scan

    batch = 5000 if HAS_GPU else 17
    edits = tuple((i % 2, 2) for i in range(batch))
    case = ScanCase(batch=batch, length=3, d_inner=1, d_state=2, edit_positions=edits, states=states)  # type: ignore[arg-type]
    inputs = random_scan_inputs(case, device=DEVICE)
    with torch.no_grad():
        s = tensors_of(inputs)
        assert triton_scan.forward_plan(s).elements > 1
        ours = selective_scan(**inputs, backend="triton")
        expected = reference(**in_float64(inputs))
    for name, value in expected.items():
        assert relative_error(getattr(ours, name), value) < 1e-5, name


@pytest.mark.parametrize(
    ("changes", "case"),
    [
        ({"elements": 3}, ScanCase(batch=4, length=9, edit_positions=((3, 7), (2, 8), (0, 3), (0, 1)), states=(2, 8))),
        ({"elements": 2, "kept": (1, 2)}, ScanCase(batch=3, length=14, n_groups=1, states=None, dtype=BF16)),
        ({"kept": (3, 7)}, ScanCase(batch=1, length=46, edit_positions=(3, 20, 41), states=(7, 38), dtype=BF16)),
        ({"kept": (2, 5)}, ScanCase(batch=1, length=36, optional=("D", "initial_state"), states=None)),
    ],
    ids=str,
)
def test_backward_of_several_elements_and_with_few_states_kept(
    changes: dict[str, object], case: ScanCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of A are added up in a program; what is not kept is replayed again."""
    from ssminterp_kernels.selective_scan import triton_gradients, triton_scan

    chosen = triton_gradients.backward_plan
    for module in (triton_gradients, triton_scan):
        monkeypatch.setattr(module, "backward_plan", lambda *s: dataclasses.replace(chosen(*s), **changes))  # type: ignore[arg-type]
    check_against_reference(case.but(d_inner=64, d_state=16), "triton", device=DEVICE)


def test_two_runs_are_equal_to_the_bit() -> None:
    case = ScanCase(length=300 if HAS_GPU else 9, d_inner=100 if HAS_GPU else 3, d_state=16)
    inputs = random_scan_inputs(case, device=DEVICE)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
    runs = []
    for _ in range(2):
        out = selective_scan(**inputs, backend="triton")
        runs.append([*out, *torch.autograd.grad(out.y.sum() + out.final_state.sum(), leaves)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def scan(**inputs: object) -> ScanOutput:
    return selective_scan(**inputs, backend="triton")  # type: ignore[arg-type]


@settings(max_examples=40 if HAS_GPU else 5)
@given(data=st.data())
def test_random_shapes_edits_and_positions(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 300 if HAS_GPU else 12), "length")
    positions = st.lists(st.integers(0, length - 1), unique=True, max_size=4).map(lambda p: tuple(sorted(p)))
    case = ScanCase(
        batch=data.draw(st.integers(1, 2), "batch"),
        length=length,
        d_inner=2 * data.draw(st.integers(1, 20 if HAS_GPU else 2), "half of d_inner"),
        d_state=data.draw(st.integers(1, 20 if HAS_GPU else 5), "d_state"),
        n_groups=data.draw(st.sampled_from([None, 1, 2]), "n_groups"),
        states=data.draw(positions, "states"),
        edit_positions=data.draw(positions, "edits"),
        strided=data.draw(st.booleans(), "strided"),
    )
    check_against_reference(case, "triton", seed=0, device=DEVICE)


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_sequence_cut_in_two_equals_the_whole(cut: int) -> None:
    inputs = random_scan_inputs(ScanCase(length=9, states=None), device=DEVICE)
    along_pos = ("x", "delta", "z", "B", "C")
    whole = scan(**inputs)
    first = scan(**inputs | {name: inputs[name][:, :cut] for name in along_pos})
    rest = {name: inputs[name][:, cut:] for name in along_pos}
    second = scan(**inputs | rest | {"initial_state": first.final_state})
    assert relative_error(torch.cat([first.y, second.y], 1), whole.y) <= 1e-6
    assert relative_error(second.final_state, whole.final_state) <= 1e-6


@pytest.mark.parametrize("change", [{"delta": 1e4}, {"delta": 0.0}, {"A": 0.0}], ids=str)
def test_extreme_step_sizes_and_decays(change: dict[str, float]) -> None:
    inputs = random_scan_inputs(
        ScanCase(length=9, optional=("D", "initial_state"), delta_softplus=False), device=DEVICE
    )
    inputs |= {name: torch.full_like(inputs[name], value) for name, value in change.items()}
    expected = reference(**in_float64(inputs))
    for name, ours in scan(**inputs)._asdict().items():
        assert relative_error(ours, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_input_stays_in_its_channel_and_does_not_reach_back(bad: float) -> None:
    inputs = random_scan_inputs(ScanCase(length=20), device=DEVICE)
    clean = scan(**inputs)
    inputs["x"] = inputs["x"].detach().clone()
    inputs["x"][1, 5, 2] = bad
    dirty = scan(**inputs)
    touched = torch.zeros(clean.y.shape, dtype=torch.bool, device=DEVICE)
    touched[1, 5:, 2] = True
    assert torch.equal(dirty.y[~touched], clean.y[~touched])
    assert dirty.states is not None
    assert clean.states is not None
    assert torch.equal(dirty.states[~touched], clean.states[~touched])


@pytest.mark.parametrize("dtype", [torch.float64])
def test_float64_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="float64"):
        scan(**random_scan_inputs(ScanCase(dtype=dtype), device=DEVICE))


def test_cpu_tensors_are_refused_outside_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        scan(**random_scan_inputs(ScanCase()))
