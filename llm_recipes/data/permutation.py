"""A seeded permutation of 0 .. n-1 that needs no memory: a Feistel network, cycle-walked.

A Feistel network over 2 * `half` bits is a bijection of 0 .. 4**half - 1, whatever its round function.
An image that falls outside 0 .. n-1 is sent through again until it falls inside; since less than
three quarters of the domain lie outside, that takes under four rounds on average.
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.)
"""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

ROUNDS = 7
_MASK = (1 << 64) - 1


@lru_cache(maxsize=4096)
def keys(*names: Any) -> tuple[int, ...]:
    """Round keys from any names: a seed, a source, an epoch."""
    text = "\x1f".join(map(str, names)).encode()
    digest = hashlib.blake2b(text, digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _mix(x: Any, key: int) -> Any:
    """Finalizer of splitmix64 over x + key; integers or uint64 arrays."""
    x = (x + key) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _encipher(x: Any, half: int, round_keys: tuple[int, ...]) -> Any:
    low = (1 << half) - 1
    left, right = x >> half, x & low
    for key in round_keys:
        left, right = right, left ^ (_mix(right, key) & low)
    return (left << half) | right


def permute(index: int, size: int, round_keys: tuple[int, ...]) -> int:
    """Where `index` goes in the permutation of 0 .. size-1 that the keys name."""
    if not 0 <= index < size:
        raise ValueError(f"index {index} lies outside 0 .. {size - 1}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        index = _encipher(index, half, round_keys)
        if index < size:
            return index


def permutation(size: int, round_keys: tuple[int, ...]) -> np.ndarray:
    """The whole permutation: `permute` of 0 .. size-1, int64 of shape (size,)."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    images = _encipher(np.arange(1 << (2 * half), dtype=np.uint64), half, round_keys)
    walked = images[:size].copy()
    while (outside := walked >= size).any():
        walked[outside] = images[walked[outside]]
    return walked.astype(np.int64)
