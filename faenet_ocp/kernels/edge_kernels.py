"""What `filtered_sum` does to an edge besides the product of matrices, on a CPU: compiled by numba, one pass an edge.

As separate operations of torch, gathering, interpolating, silu, multiplying and summing write and read every block of
edges about ten times, and take longer than the product, above all in bfloat16. Here the channels of an edge stay in the
innermost cache. Arithmetic and sums are float32; whole tensors are given, and the edges to do.

Legend: N atoms, E edges j -> i, M channels, K knots. Tensors of bfloat16 come as their bits, int16.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from faenet_ocp.common.numba import compiled
from faenet_ocp.models.functional import Activation

_CHANNELS_OF_A_THREAD = 32  # at least, and a multiple: two threads never write to the same 64 bytes


def usable(values: Tensor, act: Activation) -> bool:
    """Whether the kernels take these: float32 on a CPU, under autocast to bfloat16 or none, and silu."""
    if values.device.type != "cpu" or values.dtype != torch.float32 or act is not functional.silu:
        return False
    narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16
    return not narrow and not config.DISABLE_JIT  # type: ignore[attr-defined]


def arrays(*tensors: Tensor) -> list[NDArray[Any]]:
    """The memory of tensors, bfloat16 as int16; of a copy, if one is not contiguous."""
    plain = [tensor.detach().contiguous() for tensor in tensors]
    return [(t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for t in plain]


def run(kernel: Callable[..., Any], channels: int, *arguments: Any) -> bool:
    """Calls `kernel(*arguments, first, last)` for all channels, shared by as many threads as torch uses.

    The result does not depend on the number of threads: every channel is one thread's, edges are in their order.

    Returns:
        whether any call returned true.
    """
    share = _CHANNELS_OF_A_THREAD * math.ceil(channels / torch.get_num_threads() / _CHANNELS_OF_A_THREAD)
    first, *others = [(start, min(start + share, channels)) for start in range(0, channels, share)]
    waiting = [_pool(os.getpid(), len(others)).submit(kernel, *arguments, *part) for part in others]
    results = [kernel(*arguments, *first), *(future.result() for future in waiting)]
    return any(results)


@lru_cache(maxsize=1)
def _pool(_process: int, size: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked one has none of those of its parent."""
    return ThreadPoolExecutor(size)


def _reinterpreted(result: Any, value: Any, llvm_type: ir.Type) -> Any:
    """A function of compiled code: the same 32 bits as another type."""

    def typed(_context, _value):
        return result(value), lambda _context, builder, _signature, given: builder.bitcast(given[0], llvm_type)

    return intrinsic(typed)


_bits_to_float = _reinterpreted(types.float32, types.int32, ir.FloatType())
_float_to_bits = _reinterpreted(types.int32, types.float32, ir.IntType(32))


def _wide(value):
    """A stored number as float32."""


@overload(_wide, inline="always")
def _overload_wide(value):
    if isinstance(value, types.Integer):
        return lambda value: _bits_to_float(np.int32(value) << np.int32(16))
    return lambda value: value


def _store(row, place, value):
    """A float32 in the precision of the row that it is put into; to the nearest, halves to even."""


@overload(_store, inline="always")
def _overload_store(row, place, value):
    if isinstance(row.dtype, types.Integer):

        def narrow(row, place, value):
            bits = _float_to_bits(value)
            rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
            row[place] = np.int16(rounded) if value == value else np.int16(0x7FC0)  # NaN

        return narrow

    def same(row, place, value):
        row[place] = value

    return same


_ONE, _HALF, _FARTHEST, _LOG2_E = (np.float32(number) for number in (1, 0.5, 87, 1 / math.log(2)))
_LN2_HIGH = np.float32(0.693359375)  # has few digits: its multiples are exact
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))


@njit(inline="always")
def _sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) to the last digits of float32, in instructions that work on whole vectors.

    exp(y) is 2^n exp(r) with whole n, and Taylor's series for |r| < 0.35.
    """
    y = min(max(-x, -_FARTHEST), _FARTHEST)
    n = np.floor(y * _LOG2_E + _HALF)
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    exp_r = ((((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r + _ONE) * r + _ONE
    return _ONE / (_ONE + _bits_to_float((np.int32(n) + np.int32(127)) << np.int32(23)) * exp_r)


@compiled(fused=True)
def add_messages(m, kept, linear, knots, nodes, values, source, target, near, share, start, stop, first, last):
    """m_i += silu(W e + a_j + b_i + t) * v_j for the edges from `start` to `stop`, channels from `first` to `last`.

    Args:
        m: (N, M) float32, added to.
        kept: (E, M), or (0, M): filters before silu, written.
        linear: (stop - start, M), W e of these edges.
        knots: (K, M), t at the knots.
        nodes: (N, 2 M), a and b.
        values: (N, M) float32, v.
        source, target: (E,).
        near, share: first of the four knots of each edge, (E,), and their weights, (E, 4); or none.
        start, stop, first, last: see above.

    Returns:
        whether it ended at an edge of an atom that is not there: it would read, and write, whatever is there instead.
    """
    atoms, channels, width = values.shape[0], values.shape[1], last - first
    row = np.empty(width, np.float32)
    for edge in range(start, stop):
        j, i = source[edge], target[edge]
        if j < 0 or i < 0 or j >= atoms or i >= atoms:
            return True
        w_e = linear[edge - start, first:last]
        a, b = nodes[j, first:last], nodes[i, channels + first : channels + last]
        for c in range(width):  # several loops: with many rows in one, the compiler would not work on vectors
            row[c] = _wide(w_e[c]) + (_wide(a[c]) + _wide(b[c]))
        if len(near) > 0:
            k = min(max(near[edge], 0), len(knots) - 4)  # outside only if positions are not finite, and weights NaN
            t0, t1, t2, t3 = knots[k], knots[k + 1], knots[k + 2], knots[k + 3]
            t0, t1, t2, t3 = t0[first:last], t1[first:last], t2[first:last], t3[first:last]
            s0, s1, s2, s3 = share[edge, 0], share[edge, 1], share[edge, 2], share[edge, 3]
            for c in range(width):
                row[c] += (s0 * _wide(t0[c]) + s1 * _wide(t1[c])) + (s2 * _wide(t2[c]) + s3 * _wide(t3[c]))
        if len(kept) > 0:
            keep = kept[edge, first:last]
            for c in range(width):
                _store(keep, c, row[c])
        v, total = values[j, first:last], m[i, first:last]
        for c in range(width):
            total[c] += row[c] * _sigmoid(row[c]) * v[c]
    return False


@compiled(fused=True)
def add_gradients(
    grad_linear,
    grad_nodes,
    grad_values,
    grad_knots,
    kept,
    grad_m,
    values,
    source,
    target,
    near,
    share,
    start,
    stop,
    first,
    last,
):
    """Gradients of `add_messages` for the same edges and channels, from the filters that it has kept.

    Args:
        grad_linear: (stop - start, M) float32, by `linear`; written.
        grad_nodes: (N, 2 M) float32, added to.
        grad_values: (N, M) float32, added to.
        grad_knots: (K, M) float32, added to.
        kept: (E, M).
        grad_m: (N, M) float32.
        values, source, target, near, share, start, stop, first, last: as for `add_messages`.
    """
    channels, width = values.shape[1], last - first
    grad = np.empty(width, np.float32)  # that nothing else points to it lets the compiler work on vectors
    for edge in range(start, stop):
        j, i = source[edge], target[edge]
        linear, of_m = kept[edge, first:last], grad_m[i, first:last]
        v, of_v = values[j, first:last], grad_values[j, first:last]
        for c in range(width):
            x = _wide(linear[c])
            sigmoid = _sigmoid(x)
            of_v[c] += of_m[c] * (x * sigmoid)
            grad[c] = of_m[c] * v[c] * (sigmoid * (_ONE + x * (_ONE - sigmoid)))
        a, b = grad_nodes[j, first:last], grad_nodes[i, channels + first : channels + last]
        of_linear = grad_linear[edge - start, first:last]
        for c in range(width):
            a[c] += grad[c]
        for c in range(width):
            b[c] += grad[c]
            of_linear[c] = grad[c]
        if len(near) > 0:
            k = min(max(near[edge], 0), len(grad_knots) - 4)
            for knot in range(4):
                part, t = share[edge, knot], grad_knots[k + knot, first:last]
                for c in range(width):
                    t[c] += part * grad[c]
