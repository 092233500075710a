"""Launches the Triton kernels of the selective scan and ties them into autograd."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssminterp_kernels.launching import launch, repeated, zeros
from ssminterp_kernels.selective_scan.arguments import ScanArguments
from ssminterp_kernels.selective_scan.triton_adjoint import combine_chunks_kernel, scan_adjoint_kernel
from ssminterp_kernels.selective_scan.triton_backward import scan_backward_kernel, sum_parts_kernel
from ssminterp_kernels.selective_scan.triton_backward_plan import GRAIN, BackwardPlan, plan_backward
from ssminterp_kernels.selective_scan.triton_chunks import clear_kernel
from ssminterp_kernels.selective_scan.triton_forward import scan_forward_kernel
from ssminterp_kernels.selective_scan.triton_layouts import (
    forward_layouts_of,
    lanes_of_a_channel,
    layouts_of,
    parts_of,
)
from ssminterp_kernels.selective_scan.triton_plan import (
    Plan,
    for_all_states,
    plan_scan,
    processor_count,
)


class ScanTensors(NamedTuple):
    """The tensors of a scan as the kernels take them.

    B, C: [batch, pos, d_state] or [batch, pos, n_groups, d_state]; edits: int64 positions [batch or 1, n_edits]; keep,
    add: [batch, n_edits, d_inner, d_state], expanded; recorded: int64 positions [n_recorded]; states_dtype: that of
    recorded states.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    initial_state: Tensor | None
    edits: Tensor | None
    keep: Tensor | None
    add: Tensor | None
    recorded: Tensor | None
    softplus: bool
    record_all: bool
    states_dtype: torch.dtype


def triton_scan(
    arguments: ScanArguments,
) -> tuple[
    Float[Tensor, "batch pos d_inner"],
    Float[Tensor, "batch n_positions d_inner d_state"] | None,
    Float[Tensor, "batch d_inner d_state"],
]:
    """y, the states asked for (None if none are) and the final state; takes arguments from `check_arguments`, with or
    without an axis of groups."""
    tensors = scan_tensors(arguments)
    if torch.compiler.is_compiling():
        # Imported here because the operators are built on this module.
        from ssminterp_kernels.selective_scan.triton_ops import scan_op

        y, states, final_state, _ = scan_op(*tensors, arguments.needs_graph)
        return y, None if arguments.states is None else states, final_state
    if arguments.needs_graph:
        y, states, final_state = _Scan.apply(*tensors)
    else:
        y, states, final_state, _ = scan_forward(tensors, save=False)
    return y, states, final_state


def scan_tensors(arguments: ScanArguments) -> ScanTensors:
    """Arguments as the kernels take them; nothing is copied but lists of positions."""
    x, A, edits = arguments.x, arguments.A, arguments.edits
    positions = keep = add = None
    if edits is not None:
        shape = (x.shape[0], edits.n_edits, x.shape[2], A.shape[1])
        keep, add = edits.keep.expand(shape), edits.add.expand(shape)
        if isinstance(edits.positions, Tensor):
            positions = edits.positions.to(x.device, torch.int64).contiguous()
        else:
            positions = _positions_on(x.device, edits.positions).unsqueeze(0)
    record_all = arguments.states == "all"
    recorded = None
    if arguments.states is not None and not record_all:
        recorded = _positions_on(x.device, tuple(arguments.recorded_positions))
    return ScanTensors(
        *(x, arguments.delta, A, arguments.B, arguments.C, arguments.D, arguments.z, arguments.delta_bias),
        *(arguments.initial_state, positions, keep, add, recorded, arguments.delta_softplus, record_all),
        arguments.recorded_dtype,
    )


def _positions_on(device: torch.device, positions: tuple[int, ...]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(positions, dtype=torch.int64, device=device)
    return _kept_positions_on(device, positions)


@functools.lru_cache(maxsize=64)
def _kept_positions_on(device: torch.device, positions: tuple[int, ...]) -> Tensor:
    """Positions as a tensor; kept, because sending a handful of numbers to the GPU takes as long as a short scan."""
    return torch.tensor(positions, dtype=torch.int64, device=device)


def new_states(s: ScanTensors, *leading: int | torch.SymInt, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor [*leading, d_inner, d_state]."""
    return torch.empty(*leading, *s.A.shape, dtype=dtype, device=s.x.device)


def strided(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor as the kernels take it: pointer and strides."""
    return None if tensor is None else (tensor, *tensor.stride())


def strided_state(state: Tensor | None) -> tuple[Any, ...] | None:
    """A state [batch, d_inner, d_state] as a trajectory of one position."""
    return None if state is None else strided(state.unsqueeze(1))


def strides_of_pos(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.stride(1) for tensor in tensors)


def edit_table(positions: Tensor | None) -> tuple[Any, ...] | None:
    """(positions, stride of the batch axis: 0 if shared, n_edits)."""
    if positions is None:
        return None
    return positions, 0 if positions.shape[0] == 1 else positions.shape[1], positions.shape[1]


def position_table(positions: Tensor | None) -> tuple[Any, ...] | None:
    return None if positions is None else (positions, positions.shape[0])


def forward_plan(s: ScanTensors, save: bool = False) -> Plan:
    """How the forward pass covers s; save: for a backward pass, too."""
    batch, length, d_inner = s.x.shape
    sizes = (batch, length, d_inner, s.A.shape[1], s.B.shape[2], processor_count(s.x.device))
    # Chunks of several waves: while some wait for the state before them, others have it; the more if many bytes wait.
    wanted = 96 if s.record_all else 24
    plan = plan_scan(*sizes, unroll=GRAIN, enough_warps=3, warps_wanted=wanted, widest_block=64)
    return for_all_states(plan, length, save) if s.record_all else plan


def backward_plan(s: ScanTensors, batch: int | None = None) -> BackwardPlan:
    """How the backward pass covers s, or as many as `batch` of its elements, and which states are saved for it."""
    # Sizes that a compiler follows as symbols become those of this call.
    elements, length, d_inner = map(int, s.x.shape)
    batch = elements if batch is None else batch
    d_state, n_groups = int(s.A.shape[1]), 1 if s.B.dim() == 3 else int(s.B.shape[2])
    sizes = (batch, length, d_inner, d_state, n_groups, processor_count(s.x.device))
    return plan_backward(*sizes, s.x.dtype.itemsize, 2 if s.z is None else 3)


def _masks(plan: Plan, d_state: int) -> dict[str, bool]:
    return {"MASK_D": plan.group_size % plan.block_d != 0, "MASK_N": plan.block_n != d_state}


def _is_number(tensor: Tensor | None) -> bool:
    """Whether the items [d_inner, d_state] of a tensor are one number each."""
    return tensor is not None and tensor.stride(-1) == tensor.stride(-2) == 0


def placement(plan: Plan, length: int) -> tuple[int, ...]:
    return length, plan.chunk_length, plan.n_chunks, plan.n_blocks, plan.group_size


def _combine(decays: Tensor, locals_: Tensor, start: Tensor | None, backward: bool) -> None:
    """Turn locals_ [batch, n_chunks, d_inner, d_state] into the state with which every chunk begins."""
    batch, n_chunks, d_inner, d_state = locals_.shape
    whole = d_state * d_inner
    block = 128
    launch(
        combine_chunks_kernel,
        ((whole + block - 1) // block, batch),
        *(decays, locals_, strided(start), n_chunks, d_state, whole),
        BACKWARD=backward,
        BLOCK=block,
        AHEAD=8,
        num_warps=4,
    )


def scan_forward(
    s: ScanTensors, save: bool, every: int | None = None, batch: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y, states, final_state, and if save is set the states before the segments of the backward pass.

    The last are [batch, n_segments, d_inner, d_state]; None if there is one segment only, which begins with the initial
    state. every: segments of that many positions (a multiple of 8) instead. batch: how many of the elements the
    backward pass will see at once, if not all.
    """
    return _forward(*s, save, every, batch)


@repeated
def _forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    *fields, save, every, elements = arguments
    s = _grouped(ScanTensors(*fields))
    batch, length, _ = s.x.shape
    d_state = s.A.shape[1]
    plan = forward_plan(s, save)
    y = torch.empty_like(s.x)
    n_recorded = length if s.record_all else 0 if s.recorded is None else s.recorded.shape[0]
    states = None
    if s.record_all or s.recorded is not None:
        states = new_states(s, batch, n_recorded, dtype=s.states_dtype)
    final_state = new_states(s, batch)
    boundaries = segments = None
    segments_chunk = length
    if save:
        backward = backward_plan(s, elements)
        segments, n_boundaries = (backward.head, backward.segment), backward.boundaries
        segments_chunk = backward.chunk_length
        if every is not None:
            segments, n_boundaries = (every, every), -(-length // every)
            segments_chunk = n_boundaries * every
        boundaries = new_states(s, batch, n_boundaries) if n_boundaries > 1 else None
    recorded = position_table(s.recorded) if n_recorded else None
    start = s.initial_state if s.initial_state is None else s.initial_state.unsqueeze(1)
    decays = locals_ = ends = flags = None
    if plan.is_chunked:
        decays, locals_, ends = (new_states(s, batch, plan.n_chunks) for _ in range(3))
        flags = torch.empty(2 * plan.programs(batch), dtype=torch.int32, device=s.x.device)
        launch(clear_kernel, (-(-flags.shape[0] // 1024),), flags, flags.shape[0], BLOCK=1024, num_warps=4)
    tensors = (s.x, s.delta, s.z, s.A, s.B, s.C, s.D, s.bias, start)
    states_of_a_thread = min(plan.per_thread, plan.block_n)
    # Where few warps are at work, or states are recorded again and again, waiting for one another costs more.
    within_warps = not s.record_all and (plan.max_registers == 255 or recorded is not None)
    launch(
        scan_forward_kernel,
        (plan.programs(-(-batch // plan.elements)),),
        *(strided(tensor) for tensor in tensors),
        *(edit_table(s.edits), strided(s.keep), strided(s.add), recorded),
        *(strided(y), strided(states), strided(boundaries), strided_state(final_state)),
        *(strided(decays), strided(locals_), strided(ends), flags, segments_chunk),
        *(batch, plan.elements, *placement(plan, length), d_state),
        POS=strides_of_pos(s.x, s.delta, s.z, s.B, s.C, y, states if s.record_all else None),
        NUMBERS=(_is_number(s.keep), _is_number(s.add)),
        SOFTPLUS=s.softplus,
        RECORD_ALL=s.record_all,
        SEGMENTS=None if boundaries is None else segments,
        PARTIAL=s.edits is not None or s.recorded is not None or length % plan.unroll != 0,
        # Addresses that stay the same take registers, which edits have to spare and nothing else has.
        SEVERAL=plan.elements > 1 or (plan.max_registers == 168 and s.edits is None),
        AHEAD=_edits_ahead(s, plan),
        STATES=states_of_a_thread,
        LANES=lanes_of_a_channel(plan.block_n, states_of_a_thread),
        TOGETHER=min(8, plan.unroll),
        **tile_options(plan, d_state, within_warps),
    )
    return y, states, final_state, boundaries


def _edits_ahead(s: ScanTensors, plan: Plan) -> int:
    """When the values of an edit are loaded: when it happens (0), with the rows of its tile (1), a tile before (2).

    The earlier, the more registers they take. From memory they come later than from the cache, where values lie that
    all batch elements share.
    """
    if s.keep is None or s.add is None or plan.states_of_a_thread > (8 if s.record_all else 16):
        return 0
    if not s.record_all and plan.max_registers != 255:
        return 0
    return 1 if s.keep.stride(0) == s.add.stride(0) == 0 else 2


def _grouped(s: ScanTensors) -> ScanTensors:
    """With an axis of groups in B and C. Autograd is not asked to follow, whose bookkeeping would cost more."""
    B, C = (weights.unsqueeze(2) if weights.dim() == 3 else weights for weights in (s.B, s.C))
    return s._replace(B=B, C=C)


def scan_backward(
    s: ScanTensors,
    boundaries: Tensor | None,
    dy: Tensor | None,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    of_channels: bool = True,
) -> dict[str, Tensor | None]:
    """The gradient of every tensor of the scan, by name, from those of its outputs (None means zero).

    of_channels: whether those of A, D and bias are wanted, which are sums over batch and pos.
    """
    return dict(zip(ScanTensors._fields, _gradients(s, boundaries, dy, dstates, dfinal, of_channels), strict=False))


def _gradients(
    s: ScanTensors,
    boundaries: Tensor | None,
    dy: Tensor | None,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    of_channels: bool,
) -> list[Tensor | None]:
    """As `scan_backward`, in the order of the tensors of s."""
    if dy is None:
        dy = zeros(s.x.shape, s.x.dtype, s.x.device)
    if dfinal is None:
        dfinal = zeros((s.x.shape[0], *s.A.shape), torch.float32, s.x.device)
    found = _backward(*s, boundaries, dy, dstates, dfinal, of_channels)
    # Sums are float32, those of B and C have the dtype of B.
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, s[:13], strict=True)]


@repeated
def _backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    *fields, boundaries, dy, dstates, dfinal, of_channels = arguments
    given = ScanTensors(*fields)
    s = _grouped(given)
    batch, length, d_inner = s.x.shape
    d_state, n_groups = s.A.shape[1], s.B.shape[2]
    plan = backward_plan(s)
    n_saved = 0 if boundaries is None else boundaries.shape[1]
    if n_saved != plan.boundaries:
        raise ValueError(
            f"the forward pass saved {n_saved} states of each of {batch} elements, and their backward pass needs "
            f"{plan.boundaries}: tell scan_forward of the batch that it is for"
        )
    new = functools.partial(torch.empty, dtype=torch.float32, device=s.x.device)
    dx, ddelta = torch.empty_like(s.x), torch.empty_like(s.delta)
    dz = None if s.z is None else torch.empty_like(s.z)
    dkeep = dadd = None
    if s.edits is not None:
        dkeep, dadd = (new_states(s, batch, s.edits.shape[1]) for _ in range(2))
    n_sums = n_groups * plan.paired_blocks
    dweights = new(2, batch, length, n_sums, d_state)
    dchannels = new(batch, plan.n_chunks, 2, d_inner)
    dstart = None if s.initial_state is None else new_states(s, batch)
    layouts = layouts_of(plan.block_d, plan.block_n, plan.block_t, plan.num_warps)
    large = [tensor for tensor in (dx, ddelta, dz) if tensor is not None]
    if not _hold_rows_of_states(large):
        plan = plan.with_own_planes()
    kept = new(plan.planes, batch * plan.n_chunks, d_inner, d_state)
    masks = _masks(plan, d_state)
    edits, keep, add, recorded = edit_table(s.edits), strided(s.keep), strided(s.add), position_table(s.recorded)
    tiles = {"BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "num_warps": plan.num_warps}
    future = strided_state(dfinal)
    if plan.is_chunked:
        future = strided(futures_of_chunks(s, plan, dy, dstates, dfinal, kept[0], dweights))
    launch(clear_kernel, (-(-dweights.numel() // 4096),), dweights, dweights.numel(), BLOCK=4096, num_warps=4)
    begin = strided(boundaries) if boundaries is not None else strided_state(s.initial_state)
    launch(
        scan_backward_kernel,
        (plan.programs(batch),),
        *(
            strided(s.x),
            strided(s.delta),
            strided(s.z),
            strided(s.A),
            strided(s.B),
            strided(s.C),
            strided(s.D),
            strided(s.bias),
            begin,
        ),
        *(edits, keep, add, recorded, strided(dy), strided(dstates), future, strided(dx), strided(ddelta), strided(dz)),
        *((dweights,), (dchannels,), strided(dkeep), strided(dadd), strided_state(dstart), strided(kept)),
        *(*placement(plan, length), d_inner, d_state),
        POS=(*strides_of_pos(s.x, s.delta, s.z, s.B, s.C, dy, dx, ddelta, dz), n_sums * d_state),
        SOFTPLUS=s.softplus,
        HEAD=plan.head,
        SEGMENT=plan.segment,
        MASK=length % plan.block_t != 0 or masks["MASK_D"],
        PLANES=plan.planes,
        OUTPUTS=plan.outputs,
        MASK_N=masks["MASK_N"],
        BLOCK_T=plan.block_t,
        PARTS=parts_of(plan.block_d, plan.block_n, plan.num_warps),
        **tiles,
        **{name.upper(): layout for name, layout in layouts._asdict().items()},
        maxnreg=plan.max_registers,
    )
    dBC = sum_parts(dweights, 2 * batch * length * n_groups, n_sums // n_groups, d_state, s.B.dtype)
    dB, dC = dBC.view(2, batch, length, n_groups, d_state)
    dA = dD = dbias = None
    if of_channels:
        dA = sum_parts(kept[0], 1, batch * plan.n_chunks, d_state * d_inner, torch.float32).view(d_inner, d_state)
        sums = sum_parts(dchannels, 1, batch * plan.n_chunks, 2 * d_inner, torch.float32)
        dD, dbias = sums.view(-1).split((d_inner, d_inner))
        dD, dbias = None if s.D is None else dD, None if s.bias is None else dbias
    dB, dC = dB.view(given.B.shape), dC.view(given.C.shape)
    return dx, ddelta, dA, dB, dC, dD, dz, dbias, dstart, None, dkeep, dadd, None


def _hold_rows_of_states(outputs: list[Tensor]) -> bool:
    """Whether states can be kept in rows of these outputs: 16 bytes at a time, in the same places of each."""
    strides, itemsize = outputs[0].stride(), outputs[0].itemsize
    return strides[2] == 1 and all(
        each.dtype == outputs[0].dtype
        and each.stride() == strides
        and each.data_ptr() % 16 == each.stride(0) * itemsize % 16 == each.stride(1) * itemsize % 16 == 0
        for each in outputs
    )


def adjoint_options(s: ScanTensors, plan: Plan, dy: Tensor, events: bool) -> dict[str, Any]:
    """What the scan of adjoints is told of its plan.

    events: there are positions between tiles, so that tiles may hold less than all their positions.
    """
    length, d_state = s.x.shape[1], s.A.shape[1]
    tiles = {name: value for name, value in tile_options(plan, d_state).items() if name != "BLOCK"}
    names = ("length", "chunk_length", "n_chunks", "n_blocks", "group_size", "d_state")
    return {
        **dict(zip(names, (*placement(plan, length), d_state), strict=True)),
        "POS": strides_of_pos(s.delta, dy, s.C, s.z),
        "SOFTPLUS": s.softplus,
        "PARTIAL": events or length % plan.unroll != 0,
        **tiles,
    }


@functools.lru_cache(maxsize=256)
def tile_options(plan: Plan, d_state: int, within_warps: bool = False) -> Mapping[str, Any]:
    """What the kernels in tiles of positions are told of their plan; within_warps: see `forward_layouts_of`."""
    sizes = (plan.block_d, plan.block_n, plan.unroll, plan.num_warps, plan.per_thread)
    layouts = forward_layouts_of(*sizes, within_warps=within_warps)
    return {
        **{"BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "UNROLL": plan.unroll, "num_warps": plan.num_warps},
        **{name.upper(): layout for name, layout in layouts._asdict().items()},
        **_masks(plan, d_state),
        "maxnreg": plan.max_registers,
    }


def futures_of_chunks(
    s: ScanTensors,
    plan: Plan,
    dy: Tensor,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    futures: Tensor | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    """dLoss/d(state after each chunk) from what comes after the chunk, [batch, n_chunks, d_inner, d_state].

    futures: where they shall be, of as many numbers. spare: memory that may be written meanwhile.
    """
    batch = s.x.shape[0]
    if s.recorded is not None and s.recorded.shape[0] == 0:
        dstates = None
    shape = (batch, plan.n_chunks, *s.A.shape)
    futures = new_states(s, *shape[:2]) if futures is None else futures.view(shape)
    if spare is None or spare.numel() < futures.numel():
        decays = new_states(s, *shape[:2])
    else:
        decays = spare.view(-1)[: futures.numel()].view(shape)
    events = s.edits is not None or (dstates is not None and s.recorded is not None)
    options = adjoint_options(s, plan, dy, events) | {"n_chunks": plan.n_chunks - 1}
    launch(
        scan_adjoint_kernel,
        (plan.programs(batch) - batch * plan.n_blocks,),
        *(strided(s.delta), strided(s.z), strided(s.A), strided(s.C), strided(s.bias), edit_table(s.edits)),
        *(strided(s.keep), position_table(s.recorded), strided(dy), strided(dstates), None, None, None),
        *(strided(decays), strided(futures)),
        **options,
    )
    _combine(decays, futures, dfinal, backward=True)
    return futures


def sum_parts(parts: Tensor, rows: int, n_parts: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, n_parts, width], contiguous, summed over its middle axis in a fixed order."""
    out = torch.empty(rows, width, dtype=dtype, device=parts.device)
    block_w = min(128, 1 << (width - 1).bit_length())
    # Few programs with long rows would each wait for memory many times over.
    while block_w > 32 and rows * -(-width // block_w) < 8 * processor_count(parts.device):
        block_w //= 2
    block_p = min(2048 // block_w, 1 << (n_parts - 1).bit_length())
    launch(
        sum_parts_kernel,
        (rows, -(-width // block_w)),
        *(parts, out, n_parts, width),
        BLOCK_P=block_p,
        BLOCK_W=block_w,
        num_warps=1 if block_p * block_w < 1024 else 4,
    )
    return out


_A, _D, _BIAS = (ScanTensors._fields.index(name) for name in ("A", "D", "bias"))


class _Scan(torch.autograd.Function):
    """The scan and its backward pass; saves the inputs and the states before segments."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        s = ScanTensors(*tensors)
        y, states, final_state, boundaries = scan_forward(s, save=True)
        ctx.save_for_backward(*s[:13], boundaries)
        ctx.flags = s[13:]
        ctx.set_materialize_grads(False)
        return y, states, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstates: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        *saved, boundaries = ctx.saved_tensors
        s = ScanTensors(*saved, *ctx.flags)
        wanted = ctx.needs_input_grad
        of_channels = wanted[_A] or wanted[_D] or wanted[_BIAS]
        return *_gradients(s, boundaries, dy, dstates, dfinal, of_channels), None, None, None
