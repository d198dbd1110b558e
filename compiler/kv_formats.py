"""How a KV cache stores keys and values in one byte, or half a byte, an element.

Every row (the key or value of one token and one head) is quantized on its own when it is written, so that nothing
already stored changes. Pages are uint8 `[num_blocks, G, block_size, row_bytes]`. The page of one head, `block_size *
row_bytes` bytes, holds first the codes of all its rows, then the parameters of all its rows: codes stay aligned, and
whoever copies, shares or swaps pages need not know the format.

| | codes of a row of D elements | parameters (bfloat16) | element |
|---|---|---|---|
| `int8` | D bytes, -127..127 | scale = max abs / 127 | code * scale |
| `fp8` | D bytes, e4m3 (Micikevicius et al., arXiv:2209.05433) | scale = max abs / 448 | code * scale |
| `int4` | 16 bytes for each 32 elements | scale = (max - min) / 15, least = min | code * scale + least, then rotated |

Codes are computed against the rounded parameters, so that the 8 bits of a bfloat16 cost no accuracy, and its exponent
has room for every row (a float16 scale would lose rows below 1e-5). A row that holds a NaN or an infinity is stored
with scale NaN. In `int4`, a byte holds element i of its 32 in the low and element i + 16 in the high four bits; rows
are padded to whole blocks of 32.

Sixteen levels are too few for rows with a few large channels, as keys have. `int4` rows are therefore multiplied by a
Hadamard matrix first, which spreads every channel over all (QuaRot; Ashkboos et al., arXiv:2404.00456). It is
symmetric, and its square is the size of its blocks times the identity, so that a query rotated alike gives the same
scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

KV_CACHE_DTYPES = ("auto", "fp8", "int8", "int4")
_INT4_BLOCK = 32
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}


def code_bytes(kv_dtype: str, size: int) -> int:
    """Bytes of the codes of a row of `size` elements."""
    return -(-size // _INT4_BLOCK) * (_INT4_BLOCK // 2) if kv_dtype == "int4" else size


def row_bytes(kv_dtype: str, size: int) -> int:
    """Bytes that a row of `size` elements takes in a page, its parameters included."""
    return code_bytes(kv_dtype, size) + (4 if kv_dtype == "int4" else 2)


def rotation_block(size: int) -> int:
    """Size of the Hadamard matrices on the diagonal of the rotation: the largest power of two that divides `size`."""
    return size & -size


def hadamard(x: Tensor) -> Tensor:
    """`x[..., D]` times the rotation of `int4`, not normalised: applied twice it gives `rotation_block(D) * x`.

    The additions are those of the fast transform, whose order kernels share.
    """
    block, half = rotation_block(x.shape[-1]), 1
    while half < block:
        pairs = x.unflatten(-1, (-1, 2, half))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        half *= 2
    return x


def quantize_rows(x: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[..., code_bytes]` and parameters bfloat16 `[..., 1 or 2]` of the rows `x[..., D]`."""
    x = x.float()
    if kv_dtype == "int4":
        return _quantize_int4(hadamard(x))
    finite = x.abs().amax(-1, keepdim=True).isfinite()
    exact = x.abs().amax(-1, keepdim=True) / _LARGEST[kv_dtype]
    scale = torch.where(finite, exact, torch.nan).bfloat16()
    y = _steps(x, scale).clamp(-_LARGEST[kv_dtype], _LARGEST[kv_dtype])
    codes = y.round().to(torch.int8) if kv_dtype == "int8" else y.to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scale


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """`x / scale`, zero where the scale is zero or NaN."""
    wide = scale.float()
    return torch.where(wide > 0, x / wide, torch.zeros(()))


def _quantize_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    finite = x.abs().amax(-1, keepdim=True).isfinite()
    scale = torch.where(finite, (greatest - least) / 15, torch.nan).bfloat16()
    least = torch.where(finite, least, torch.zeros(())).bfloat16()
    codes = _steps(x - least.float(), scale).round().clamp(0, 15).to(torch.uint8)
    padded = F.pad(codes, (0, -codes.shape[-1] % _INT4_BLOCK)).unflatten(-1, (-1, 2, _INT4_BLOCK // 2))
    return (padded[..., 0, :] | padded[..., 1, :] << 4).flatten(-2), torch.cat((scale, least), -1)


def dequantize_rows(codes: Tensor, parameters: Tensor, kv_dtype: str, size: int) -> Tensor:
    """What `quantize_rows` stored of rows of `size` elements, in float32."""
    scale = parameters[..., :1].float()
    if kv_dtype == "int8":
        return codes.view(torch.int8).float() * scale
    if kv_dtype == "fp8":
        return codes.view(torch.float8_e4m3fn).float() * scale
    blocks = codes.unflatten(-1, (-1, 1, _INT4_BLOCK // 2))
    elements = torch.cat((blocks & 15, blocks >> 4), -2).flatten(-3)[..., :size]
    return hadamard(elements.float() * scale + parameters[..., 1:].float()) / rotation_block(size)


def page_parts(cache: Tensor, kv_dtype: str, size: int) -> tuple[Tensor, Tensor]:
    """Views of pages `[blocks, G, block_size, row_bytes]`: codes and parameters of each row, both as uint8."""
    blocks, groups, block_size, _ = cache.shape
    width = code_bytes(kv_dtype, size)
    pages = cache.view(blocks, groups, -1)
    codes, parameters = pages[..., : block_size * width], pages[..., block_size * width :]
    return codes.unflatten(-1, (block_size, width)), parameters.unflatten(-1, (block_size, -1))


def store_rows(cache: Tensor, block: Tensor, offset: Tensor, x: Tensor, kv_dtype: str) -> None:
    """Writes the rows `x[T, G, D]` into row `offset[t]` of block `block[t]`, in place."""
    if kv_dtype == "auto":
        cache[block, :, offset] = x
        return
    codes, parameters = quantize_rows(x, kv_dtype)
    code_view, parameter_view = page_parts(cache, kv_dtype, x.shape[-1])
    code_view[block, :, offset] = codes
    parameter_view[block, :, offset] = parameters.view(torch.uint8)


def load_pages(cache: Tensor, blocks: Tensor, kv_dtype: str, size: int) -> Tensor:
    """The rows of the given blocks, one block behind the other: `[len(blocks) * block_size, G, D]`."""
    if kv_dtype == "auto":
        return cache[blocks].transpose(1, 2).flatten(0, 1)
    codes, parameters = (part[blocks].transpose(1, 2).flatten(0, 1) for part in page_parts(cache, kv_dtype, size))
    return dequantize_rows(codes, parameters.contiguous().view(torch.bfloat16), kv_dtype, size)
