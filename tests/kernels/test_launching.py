"""What functions marked with `repeated` do again: kernels here are Python functions that write to addresses."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ssminterp_kernels
from ssminterp_kernels import launching, sized_launching
from ssminterp_kernels.first_launches import told_of_first_launches
from ssminterp_kernels.launching import launch, repeated
from ssminterp_kernels.sized_launching import Sized

knobs = pytest.importorskip("triton").knobs
STREAM = 17


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launching, sized_launching):
        monkeypatch.setattr(module, "stream_getter", lambda device: lambda: STREAM)


class Compiled:
    """What a launch of a kernel gives: it is launched with all of the kernel's parameters by position."""

    function, packed_metadata = 5, (1, 1, 0)

    def __init__(self, fn: Callable[..., None]) -> None:
        self.fn = fn
        self.launches = 0
        self.launches_heard_of = 0

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *hooks_and_arguments: Any) -> None:
        about, before, after, *arguments = hooks_and_arguments
        assert (stream, function, metadata, about, before, after) == (STREAM, 5, (1, 1, 0), None, None, None)
        self.launches += 1
        self.fn(*arguments)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert len(grid) == 3

        def run(*arguments: Any) -> None:
            self.launches_heard_of += 1
            self.fn(*arguments)

        return run


class Kernel:
    """A kernel that is compiled anew in every ordinary launch."""

    def __init__(self, fn: Callable[..., None]) -> None:
        self.fn = fn
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(*arguments: Any, num_warps: int = 4, **named: Any) -> Compiled:
            self.fn(*arguments, **named)
            self.compiled.append(Compiled(self.fn))
            return self.compiled[-1]

        return run

    @property
    def launches_again(self) -> int:
        return sum(compiled.launches for compiled in self.compiled)


def numbers_at(tensor: tuple[Any, ...], n: int) -> list[Any]:
    """The numbers of a vector (address or tensor, stride), as things whose `value` can be read and written."""
    where, stride = tensor
    address = where.data_ptr() if isinstance(where, Tensor) else where
    return [ctypes.c_float.from_address(address + 4 * i * stride) for i in range(n)]


def _add_scaled(x: Any, y: Any, out: Any, n: int, SCALE: float = 1.0) -> None:
    xs, outs = numbers_at(x, n), numbers_at(out, n)
    ys = None if y is None else numbers_at(y, n)
    for i in range(n):
        outs[i].value = xs[i].value + (0.0 if ys is None else SCALE * ys[i].value)


def strided(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x, x.stride(0))


def add_twice(kernel: Kernel) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """x + scale · (x + y), and of that every other number if `half`."""

    @repeated
    def function(x: Tensor, y: Tensor | None, scale: float, half: bool) -> tuple[Tensor, Tensor | None]:
        n = x.shape[0]
        unused, between = torch.empty(3), torch.empty_like(x)
        assert unused.shape == (3,)
        out = x.new_empty(n, 2).t()[0]
        launch(kernel, (1,), strided(x), strided(y), strided(between), n, num_warps=1)
        launch(kernel, (1, n), strided(x), strided(between), strided(out), n, SCALE=scale)
        return out, out[::2] if half else None

    return function


def expected(x: Tensor, y: Tensor | None, scale: float, half: bool) -> tuple[Tensor, Tensor | None]:
    out = x + scale * (x if y is None else x + y)
    return out, out[::2] if half else None


@given(
    n=st.integers(1, 6),
    calls=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 5), st.booleans(), st.sampled_from([0.5, 2.0]), st.booleans()),
        min_size=1,
        max_size=8,
    ),
)
def test_what_is_repeated_is_what_the_function_does(n: int, calls: list[tuple[int, int, bool, float, bool]]) -> None:
    """Whatever the strides, alignments and flags, and whichever arguments are one tensor; results are new tensors."""
    kernel = Kernel(_add_scaled)
    function = add_twice(kernel)
    layouts, kept = set(), []
    for stride, offset, same, scale, half in [*calls, *calls]:
        x = torch.randn(8 + 6 * 3)[offset:][::stride][:n]
        y = x if same else torch.randn(n)
        result = function(x, y, scale, half)
        wanted = expected(x, y, scale, half)
        kept.append((result, wanted))
        # One number has any stride it likes.
        layouts.add((x.stride(), x.data_ptr() % 16, same, scale, half))
    for result, wanted in kept:
        for part, correct in zip(result, wanted, strict=True):
            assert (part is None) == (correct is None)
            if part is not None and correct is not None:
                torch.testing.assert_close(part, correct)
    assert kernel.launches_again == 2 * (2 * len(calls)) - len(kernel.compiled)
    assert len(kernel.compiled) <= 2 * len(layouts)


def test_arguments_that_were_one_tensor_may_be_two_the_next_time() -> None:
    function = add_twice(Kernel(_add_scaled))
    x, y = torch.randn(2, 4)
    function(x, x, 1.0, False)
    torch.testing.assert_close(function(x, y, 1.0, False)[0], 2 * x + y)
    torch.testing.assert_close(function(y, y, 1.0, False)[0], 3 * y)


def test_results_keep_strides_and_share_memory_as_the_functions_do() -> None:
    function = add_twice(Kernel(_add_scaled))
    for _ in range(3):
        out, half = function(torch.randn(6), None, 1.0, True)
        assert half is not None
        assert out.stride() == (2,)
        assert half.stride() == (4,)
        assert half.data_ptr() == out.data_ptr()


@pytest.mark.parametrize(
    "otherwise",
    [
        pytest.param(lambda out: out.zero_(), id="in place"),
        pytest.param(lambda out: out + 1, id="by torch"),
        pytest.param(lambda out: torch.zeros(4), id="zeros"),
    ],
)
def test_what_is_more_than_allocating_and_launching_is_never_repeated(otherwise: Callable[[Tensor], Tensor]) -> None:
    kernel = Kernel(_add_scaled)

    @repeated
    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        launch(kernel, (1,), strided(x), None, strided(out), 4)
        return otherwise(out)

    for _ in range(3):
        x = torch.randn(4)
        assert torch.equal(function(x), otherwise(x.clone()))
    assert kernel.launches_again == 0


def test_constants_and_other_peoples_tensors_are_never_repeated() -> None:
    """A tensor that is no argument may be another the next time."""
    kernel = Kernel(_add_scaled)
    current = torch.ones(4)

    @repeated
    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        launch(kernel, (1,), strided(x), strided(current), strided(out), 4)
        return out

    for value in (1.0, 2.0, 3.0):
        current = torch.full((4,), value)
        assert torch.equal(function(torch.zeros(4)), current)


def test_what_the_interpreter_runs_is_never_repeated() -> None:
    class Interpreted(Kernel):
        def __getitem__(self, grid: Any) -> Any:
            def run(*arguments: Any, **named: Any) -> None:
                self.fn(*arguments)

            return run

    @repeated
    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        launch(Interpreted(_add_scaled), (1,), strided(x), None, strided(out), 4)
        return out

    for _ in range(3):
        x = torch.randn(4)
        assert torch.equal(function(x), x)


def test_first_launches_are_told_of_by_name_and_later_ones_are_not() -> None:
    told: list[str] = []
    function, sized = add_twice(Kernel(_add_scaled)), Sized(Kernel(_add_scaled))
    function(torch.randn(2), None, 1.0, False)
    with told_of_first_launches(told.append):
        for n in (2, 3, 3):
            function(torch.randn(n), None, 1.0, False)
            x, out = torch.randn(n), torch.empty(n)
            sized(1, ((x, 1), None, (out, 1)), (), (n,), (), num_warps=4)
            assert torch.equal(out, x)
    function(torch.randn(5), None, 1.0, False)
    assert told == ["_add_scaled", "function"]


def test_one_function_inside_of_another_is_part_of_it() -> None:
    kernel = Kernel(_add_scaled)
    inner = add_twice(kernel)

    @repeated
    def outer(x: Tensor) -> Tensor:
        return inner(inner(x, None, 1.0, False)[0], x, 1.0, False)[0]

    for _ in range(3):
        x = torch.randn(5)
        torch.testing.assert_close(outer(x), 5 * x)
    assert kernel.launches_again == 2 * 4
    assert inner.known == {}  # type: ignore[attr-defined]


def test_an_error_leaves_nothing_behind() -> None:
    @repeated
    def function(x: Tensor, fails: bool) -> Tensor:
        if fails:
            raise RuntimeError("no")
        return torch.empty_like(x)

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            function(torch.ones(2), True)
        assert function(torch.ones(2), False).shape == (2,)


def test_what_other_threads_launch_is_not_part_of_it() -> None:
    kernel = Kernel(_add_scaled)
    function = add_twice(kernel)

    @repeated
    def watched(x: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: function(torch.ones(3), None, 1.0, False))
        other.start()
        other.join()
        out = torch.empty_like(x)
        launch(kernel, (1,), strided(x), None, strided(out), 2)
        return out

    assert torch.equal(watched(torch.ones(2)), torch.ones(2))
    again = kernel.launches_again
    assert torch.equal(watched(torch.full((2,), 7.0)), torch.full((2,), 7.0))
    assert kernel.launches_again == again + 1


def test_profilers_hear_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(_add_scaled)
    function = add_twice(kernel)
    heard = knobs.HookChain()
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", heard)
    for n_heard in (0, 0, 2, 4):
        x = torch.randn(3)
        torch.testing.assert_close(function(x, None, 1.0, False)[0], 2 * x)
        assert sum(compiled.launches_heard_of for compiled in kernel.compiled) == n_heard
        if kernel.launches_again:
            heard.add(print)
    assert kernel.launches_again == 2


def test_flags_that_cannot_be_hashed_are_the_functions_own_affair() -> None:
    @repeated
    def function(x: Tensor, flag: object) -> Tensor:
        raise ValueError(f"bad flag {flag!r}")

    with pytest.raises(ValueError, match=r"bad flag \[\]"):
        function(torch.ones(2), [])


def test_few_layouts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST_LAYOUTS", 3)
    function = add_twice(Kernel(_add_scaled))
    for n in (*range(1, 9), *range(1, 9)):
        x = torch.randn(n)
        torch.testing.assert_close(function(x, None, 1.0, False)[0], 2 * x)
        assert len(function.known) <= 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("operator", ["selective_scan", "scan_step", "causal_conv"])
def test_kernels_are_launched_where_it_is_noticed(operator: str) -> None:
    """`kernel[grid](…)` in a function that is repeated would be left out the next time."""
    sources = sorted((Path(ssminterp_kernels.__file__).parent / operator).glob("*.py"))
    assert any("launch(" in source.read_text() for source in sources)
    for source in sources:
        assert not re.search(r"_kernel\[", source.read_text()), source
