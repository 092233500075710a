"""Launching Triton kernels whose sizes change from call to call; see `launching` for those that are repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssminterp_kernels.first_launches import tell_of_first_launch
from ssminterp_kernels.launching import MOST_LAYOUTS, launches_are_heard_of, stream_getter


class Sized:
    """Launches a kernel whose sizes change from call to call, where `repeated` would know no layout again.

    The kernel must be marked not to specialise on them, and take its arguments in the order of `__call__`.
    max_registers: of a thread; None leaves it to the compiler.
    """

    def __init__(self, kernel: Any, max_registers: int | None = None) -> None:
        self.kernel = kernel
        self._options = {} if max_registers is None else {"maxnreg": max_registers}
        self._known: dict[Any, Any] = {}

    def __call__(
        self,
        grid: int,
        tensors: Sequence[Any],
        fixed: tuple[int, ...],
        sizes: tuple[int, ...],
        constants: tuple[Any, ...],
        num_warps: int,
    ) -> None:
        """`kernel[(grid,)](*tensors, *fixed, *sizes, *constants, num_warps=num_warps)`, on the GPU of the tensors.

        tensors: tensors, tuples of a tensor and integers (strides), and None; the first is a tuple or a tensor.
        """
        first = tensors[0] if isinstance(tensors[0], Tensor) else tensors[0][0]
        index = first.get_device()
        if index >= 0 and torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                return self(grid, tensors, fixed, sizes, constants, num_warps)
        # Of tensors what a kernel is compiled for: dtypes, strides, and which pointers are multiples of 16. Pointers
        # are given as numbers, which spares the launcher to ask the driver whose they are.
        key: list[Any] = [index, fixed, constants]
        pointers: list[Any] = []
        lowest_bits = 0
        for argument in tensors:
            if argument is None:
                key.append(None)
                pointers.append(None)
            elif type(argument) is tuple:
                tensor, *strides = argument
                pointer = tensor.data_ptr()
                key += (tensor.dtype, *strides)
                pointers.append((pointer, *strides))
                lowest_bits |= pointer
            else:
                pointer = argument.data_ptr()
                key.append(argument.dtype)
                pointers.append(pointer)
                lowest_bits |= pointer
        if lowest_bits & 15:
            key += [p and (p[0] if isinstance(p, tuple) else p) & 15 == 0 for p in pointers]
        compiled = self._known.get(layout := tuple(key))
        if compiled is None or launches_are_heard_of():
            if compiled is None:
                tell_of_first_launch(self.kernel.fn.__name__)
            options = {"num_warps": num_warps, **self._options}
            compiled = self.kernel[(grid,)](*tensors, *fixed, *sizes, *constants, **options)
            if len(self._known) >= MOST_LAYOUTS:
                self._known.clear()
            if hasattr(compiled, "packed_metadata"):  # the interpreter compiles nothing
                self._known[layout] = compiled
            return None
        arguments = (*pointers, *fixed, *sizes, *constants)
        metadata, stream = compiled.packed_metadata, stream_getter(index)()
        compiled.run(grid, 1, 1, stream, compiled.function, metadata, None, None, None, *arguments)
        return None
