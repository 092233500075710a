"""Vectors of `LANES` float32 as a type of numba's, for loops that LLVM does not vectorise by itself.

It cannot tell that the arrays of a scan do not overlap, and the checks that it makes at run time take longer than the
short loops they guard. On CPUs with narrower vectors LLVM splits these.

    v = load(array, (i, j, c))          array[i, j, c : c + LANES], which must lie in one piece
    store(array, (i, j, c), v)
    splat(x)                            x in every lane
    v + w, v - w, v * w, v / w, maximum(v, w), exp2(v), lane_sum(v)

Inside `njit` only. Multiplications and additions may be fused.
"""

from __future__ import annotations

import operator
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from ssminterp_kernels.rows.layout import LANES

_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_FUSED = ("contract",)
# 2^f on [-1/2, 1/2] to 2e-9, as in `selective_scan.numba_kernels`: the constant term is exactly 1.
_POLYNOMIAL = (1.0, 0.693147206, 0.240226485, 0.0555032904, 0.00961837325, 0.00133998483, 0.000153707048)
_ROUND = 12582912.0  # 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the mantissa
_TO_EXPONENT = 127 - 0x4B400000  # from the bits of (integer + _ROUND) to a biased exponent
_LOWEST, _HIGHEST = -126.0, 128.0


class Vector(types.Type):
    """numba's name for the type."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = Vector()


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)


@no_type_check
def _binary(name: str) -> Any:
    """The intrinsic of one instruction on two vectors."""

    @intrinsic
    def instruction(typing_context, v, w):
        def emit(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments, flags=_FUSED)

        return vector(vector, vector), emit

    return instruction


@no_type_check
def _overload(symbol: Any, name: str) -> None:
    instruction = _binary(name)

    @overload(symbol)
    def operation(v, w):
        if v is vector and w is vector:
            return lambda v, w: instruction(v, w)


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _overload(_symbol, _name)


@no_type_check
def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index_type: Any, index: Any) -> Any:
    indices = [
        context.cast(builder, i, own, types.intp)
        for i, own in zip(cgutils.unpack_tuple(builder, index), index_type, strict=True)
    ]
    held = context.make_array(array_type)(context, builder, array)
    pointer = cgutils.get_item_pointer(context, builder, array_type, held, indices)
    return builder.bitcast(pointer, ir.PointerType(_FLOATS))


@intrinsic
@no_type_check
def load(typing_context, array, index):
    """LANES elements of a float32 array from an index, a tuple, on along its last axis."""

    def emit(context, builder, signature, arguments):
        array_type, index_type = signature.args
        value = builder.load(_pointer(context, builder, array_type, arguments[0], index_type, arguments[1]))
        value.align = 4
        return value

    return vector(array, index), emit


@intrinsic
@no_type_check
def store(typing_context, array, index, v):
    """Put a vector where `load` takes one."""

    def emit(context, builder, signature, arguments):
        array_type, index_type, _ = signature.args
        pointer = _pointer(context, builder, array_type, arguments[0], index_type, arguments[1])
        builder.store(arguments[2], pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, index, vector), emit


@intrinsic
@no_type_check
def splat(typing_context, x):
    """A float32 in every lane."""

    def emit(context, builder, signature, arguments):
        first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), arguments[0], ir.IntType(32)(0))
        return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))

    return vector(types.float32), emit


@intrinsic
@no_type_check
def maximum(typing_context, v, w):
    """The larger of two in each lane; w where v is NaN."""

    def emit(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return vector(vector, vector), emit


@intrinsic
@no_type_check
def lane_sum(typing_context, v):
    """The sum of all lanes, a float32."""

    def emit(context, builder, signature, arguments):
        (v,) = arguments
        half = LANES // 2
        while half:
            upper = ir.Constant(_INTS, [(lane + half) % LANES for lane in range(LANES)])
            v = builder.fadd(v, builder.shuffle_vector(v, v, upper))
            half //= 2
        return builder.extract_element(v, ir.IntType(32)(0))

    return types.float32(vector), emit


@intrinsic
@no_type_check
def exp2(typing_context, u):
    """2^u to 1e-7 relative; 0 instead of what would be subnormal, infinity above 2^127.5. NaN stays NaN."""

    def emit(context, builder, signature, arguments):
        (u,) = arguments
        # One instruction each rounds and scales where there are vectors of this width.
        whole = "avx512f" in _features(context)
        if whole:
            rounded = _called(builder, "llvm.rint.v16f32", u)
        else:
            highest = _constant(_HIGHEST)
            bounded = builder.select(builder.fcmp_ordered(">", u, highest), highest, u)
            shifted = builder.fadd(bounded, _constant(_ROUND))
            u, rounded = bounded, builder.fsub(shifted, _constant(_ROUND))
        f = builder.fsub(u, rounded)
        power = _constant(_POLYNOMIAL[-1])
        for coefficient in _POLYNOMIAL[-2::-1]:
            power = builder.fadd(builder.fmul(power, f, flags=_FUSED), _constant(coefficient), flags=_FUSED)
        if whole:
            every_lane, nearest = ir.IntType(16)(-1), ir.IntType(32)(4)
            scaling = "llvm.x86.avx512.mask.scalef.ps.512"
            scaled = _called(builder, scaling, power, rounded, _constant(0.0), every_lane, nearest)
        else:
            exponent = builder.add(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [_TO_EXPONENT] * LANES))
            scale = builder.bitcast(builder.shl(exponent, ir.Constant(_INTS, [23] * LANES)), _FLOATS)
            scaled = builder.fmul(power, scale)
        return builder.select(builder.fcmp_ordered("<", u, _constant(_LOWEST)), _constant(0.0), scaled)

    return vector(vector), emit


@no_type_check
def _called(builder, name, *arguments):
    """The result of one of LLVM's own functions, a vector."""
    kind = ir.FunctionType(_FLOATS, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _features(context: Any) -> list[str]:
    """Of the CPU that numba compiles for."""
    return [name[1:] for name in context.codegen()._tm_features.split(",") if name.startswith("+")]


def _constant(value: float) -> Any:
    """A float32 in every lane, of a value that float32 holds or is rounded to."""
    return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)
