"""XXH3-128 without seed as a compiled loop, for the scan's loops: the value that xxhash gives.

Y. Collet, "XXH3 algorithm overview" (doc/xxhash_spec.md of xxHash), inputs above 240 bytes. The
library hashes as fast, but must be called from Python: a lock and a microsecond for each image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.compiled import compiled  # before numba itself, which it keeps from scipy

from llvmlite import ir  # isort: skip
from numba import types  # isort: skip
from numba.core import cgutils  # isort: skip
from numba.extending import intrinsic  # isort: skip

Words = npt.NDArray[np.uint64]

MIN_BYTES = 241

_BLOCK, _STRIPE, _STRIPES, _LANES = 1024, 64, 16, 8
_word: Any = np.uint64
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_PRIME_32_1 = np.uint64(0x9E3779B1)
_PRIME_64_1 = np.uint64(0x9E3779B185EBCA87)
_PRIME_64_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME_MX = np.uint64(0x165667919E3779F9)
_START = np.array(
    [0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
     0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1], np.uint64,
)  # fmt: skip
_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)


@_intrinsic
def _word_at(context: Any, address: Any) -> Any:
    """Return the 8 bytes at an address, little-endian as memory is here."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(types.uintp), generate


@_intrinsic
def _accumulate(context: Any, lanes: Any, data: Any, secret: Any, num: Any) -> Any:
    """Mix `num` stripes of 64 bytes at `data` into the 8 lanes; `secret` goes on 8 bytes a stripe.

    As vectors of 8 words: LLVM does not find them by itself in a loop over lanes.
    """
    signature = types.void(types.uintp, types.uintp, types.uintp, types.int64)
    word = ir.IntType(64)
    vector = ir.VectorType(word, _LANES)
    halves = [ir.Constant(vector, [value] * _LANES) for value in (0xFFFFFFFF, 32)]
    neighbours = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [1, 0, 3, 2, 5, 4, 7, 6])

    def at(builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, vector.as_pointer())

    def load(builder: Any, address: Any) -> Any:
        loaded = builder.load(at(builder, address))
        loaded.align = 1
        return loaded

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, data, secret, num = arguments
        lanes = cgutils.alloca_once_value(builder, load(builder, to))
        with cgutils.for_range(builder, num, intp=word) as loop:
            here = builder.mul(loop.index, ir.Constant(word, _STRIPE))
            mask = builder.mul(loop.index, ir.Constant(word, 8))
            stripe = load(builder, builder.add(data, here))
            keyed = builder.xor(stripe, load(builder, builder.add(secret, mask)))
            low, high = builder.and_(keyed, halves[0]), builder.lshr(keyed, halves[1])
            swapped = builder.shuffle_vector(stripe, ir.Constant(vector, ir.Undefined), neighbours)
            added = builder.add(builder.mul(low, high), swapped)
            builder.store(builder.add(builder.load(lanes), added), lanes)
        builder.store(builder.load(lanes), at(builder, to)).align = 1
        return context.get_dummy_value()

    return signature, generate


@compiled(types.uint64(types.uint64, types.uint64))
def _folded_product(a: Any, b: Any) -> Any:
    """Return the low 64 bits of a product of 128, exclusive-or the high ones."""
    low = (a & _LOW) * (b & _LOW)
    left, right = (a >> _HALF) * (b & _LOW), (a & _LOW) * (b >> _HALF)
    middle = (low >> _HALF) + (left & _LOW) + right
    high = (a >> _HALF) * (b >> _HALF) + (left >> _HALF) + (middle >> _HALF)
    return (low & _LOW | middle << _HALF) ^ high


@compiled(types.uint64(types.Array(types.uint64, 1, "C"), types.uintp, types.uint64))
def _merged(lanes: Words, secret: Any, value: Any) -> Any:
    """Merge the lanes into one word, and let every bit of them reach every bit of it."""
    for i in range(0, _LANES, 2):
        value += _folded_product(
            lanes[i] ^ _word_at(secret + 8 * i), lanes[i + 1] ^ _word_at(secret + 8 * i + 8)
        )
    value ^= value >> _word(37)
    value *= _PRIME_MX
    return value ^ (value >> _HALF)


@compiled(
    types.UniTuple(types.uint64, 2)(types.uintp, types.int64, types.Array(types.uint64, 1, "C"))
)
def xxh3_128(data: Any, size: int, lanes: Words) -> tuple[Any, Any]:
    """Return the high and the low word of the hash of `size` bytes, MIN_BYTES or more, at `data`.

    `lanes`: 8 words to work with.
    """
    secret, to = _SECRET.ctypes.data, lanes.ctypes.data
    lanes[:] = _START
    num_blocks = (size - 1) // _BLOCK
    for block in range(num_blocks):
        _accumulate(to, data + block * _BLOCK, secret, _STRIPES)
        for i in range(_LANES):
            lane = lanes[i]
            lanes[i] = (lane ^ (lane >> _word(47)) ^ _word_at(secret + 128 + 8 * i)) * _PRIME_32_1
    rest = (size - 1 - num_blocks * _BLOCK) // _STRIPE
    _accumulate(to, data + num_blocks * _BLOCK, secret, rest)
    _accumulate(to, data + size - _STRIPE, secret + 121, 1)
    length = _word(size)
    low = _merged(lanes, secret + 11, length * _PRIME_64_1)
    high = _merged(lanes, secret + 117, ~(length * _PRIME_64_2))
    return high, low
