"""The functions of the loop IR in Triton, and what the kernel templates share.

Written out where Triton has no function of its own that its interpreter also knows. All are elementwise.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The interpreter knows nothing of libdevice.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def expm1(x):
    """Taylor's series near zero, where the difference would lose its leading digits; exact enough for float64."""
    series = x * 0.0 + 1.0
    for n in tl.static_range(12):
        series = 1.0 + series * x / (13 - n)
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    t = expm1(-2.0 * tl.abs(x))
    far = -t / (t + 2.0)
    return tl.where(x < 0.0, -far, far)


@triton.jit
def log1p(x):
    """Kahan's correction of log(1 + x) for the rounding of the sum."""
    u = 1.0 + x
    corrected = tl.log(u) * (x / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, corrected))


@triton.jit
def trunc(x):
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_even(x):
    low = tl.floor(x)
    part = x - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return tl.where(part > 0.5, low + 1.0, tl.where(part < 0.5, low, low + odd))


@triton.jit
def sign(x):
    return tl.where(x > 0, 1, tl.where(x < 0, -1, 0)).to(x.dtype)


@triton.jit
def shl(x, n):
    """A shift by a negative number or by the width and more gives what shifting every bit out gives."""
    fits = (n >= 0) & (n < x.dtype.primitive_bitwidth)
    return tl.where(fits, x << tl.where(fits, n, 0), 0).to(x.dtype)


@triton.jit
def shr(x, n):
    """As `shl`: 0, or of a negative number -1."""
    fits = (n >= 0) & (n < x.dtype.primitive_bitwidth)
    return tl.where(fits, x >> tl.where(fits, n, 0), tl.where(x < 0, -1, 0)).to(x.dtype)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_erf(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def relu(x):
    return tl.where(x < 0, 0, x).to(x.dtype)


@triton.jit
def tan(x):
    return tl.sin(x) / tl.cos(x)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation of that name, as `compiler.ops.ACTIVATIONS` lists them."""
    if ACT == "silu":
        return silu(x)
    elif ACT == "gelu_erf":
        return gelu_erf(x)
    elif ACT == "gelu_tanh":
        return gelu_tanh(x)
    else:
        return relu(x)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a b`. "wide" takes the factors to float32 first, for the interpreter knows no bfloat16 products."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


# ---- quotients: Triton's own integer division truncates -------------------------------------------------------------


@triton.jit
def int_trunc_div(a, b):
    """A zero divisor, at which PyTorch raises, gives 0."""
    return tl.where(b == 0, 0, a // tl.where(b == 0, 1, b)).to(a.dtype)


@triton.jit
def int_trunc_mod(a, b):
    return tl.where(b == 0, 0, a % tl.where(b == 0, 1, b)).to(a.dtype)


@triton.jit
def int_floor_div(a, b):
    q = int_trunc_div(a, b)
    r = int_trunc_mod(a, b)
    return (q - ((r != 0) & ((r < 0) != (b < 0))).to(q.dtype)).to(a.dtype)


@triton.jit
def int_floor_mod(a, b):
    r = int_trunc_mod(a, b)
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r).to(a.dtype)


@triton.jit
def float_div(a, b):
    """Rounded to nearest: what is cut to an integer must not lie beside it. `/` is not that exact for float32."""
    if a.dtype == tl.float64:
        q = a / b
    else:
        q = tl.div_rn(a, b)
    return q


@triton.jit
def float_fmod(a, b):
    """Exact, as C's; on a GPU Triton's own `%` is `a - trunc(a / b) * b`, which large quotients lead astray."""
    if _INTERPRETED:
        r = a % b
    else:
        r = libdevice.fmod(a, b)
    return r


@triton.jit
def float_remainder(a, b):
    r = float_fmod(a, b)
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def float_floor_div(a, b):
    """PyTorch's: the quotient without the remainder, so that it never lands beside an integer."""
    exact = float_div(a - float_remainder(a, b), b)
    near = tl.floor(exact)
    return tl.where(b == 0, a / b, tl.where(exact - near > 0.5, near + 1.0, near))


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def float_pow(a, b):
    """|a|^b in float64, then the sign that an odd power has; NaN for a root of a negative number."""
    magnitude = tl.abs(a).to(tl.float64)
    power = tl.exp2(b.to(tl.float64) * tl.log2(tl.where(magnitude == 0, 1.0, magnitude)))
    zero = tl.where(b > 0, 0.0, float("inf"))
    power = tl.where(magnitude == 0, zero, power)
    whole = b == tl.floor(b)
    odd = whole & (b * 0.5 != tl.floor(b * 0.5))
    signed = tl.where(odd, -power, power)
    result = tl.where(a < 0, tl.where(whole, signed, float("nan")), power)
    return tl.where((b == 0) | (a == 1), 1.0, result).to(a.dtype)


@triton.jit
def int_pow(a, b):
    """By squaring; powers beyond 2^16 are out of every integer type but for -1, 0 and 1, which stay right."""
    result = tl.where(b == b, 1, 0).to(a.dtype) + a * 0
    base = a
    rest = b
    for _ in tl.static_range(17):
        result = tl.where((rest & 1) != 0, result * base, result).to(a.dtype)
        base = (base * base).to(a.dtype)
        rest = rest >> 1
    return result


# ---- reductions -----------------------------------------------------------------------------------------------------


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def row_sum(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def row_prod(x):
    return tl.reduce(x, 1, _times)[:, None]


@triton.jit
def row_any(x):
    return (tl.max(x.to(tl.int32), 1) != 0)[:, None]


@triton.jit
def row_all(x):
    return (tl.min(x.to(tl.int32), 1) != 0)[:, None]


@triton.jit
def row_max_float(x):
    nan = tl.max((x != x).to(tl.int32), 1) != 0
    return tl.where(nan, float("nan"), tl.max(x, 1)).to(x.dtype)[:, None]


@triton.jit
def row_min_float(x):
    nan = tl.max((x != x).to(tl.int32), 1) != 0
    return tl.where(nan, float("nan"), tl.min(x, 1)).to(x.dtype)[:, None]


@triton.jit
def row_max_int(x):
    return tl.max(x, 1).to(x.dtype)[:, None]


@triton.jit
def row_min_int(x):
    return tl.min(x, 1).to(x.dtype)[:, None]
