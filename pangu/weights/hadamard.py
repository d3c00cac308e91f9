"""Orthonormal Hadamard matrices of the sizes that hidden states have.

H of size 2^p·m is the Kronecker product of Sylvester's matrix of size 2^p and Paley's of size m: by
construction I where m - 1 is a prime of the form 4k + 3, by II where m / 2 - 1 is one of the form
4k + 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def hadamard(size: int) -> Matrix:
    """H `[size, size]`, entries ±1/sqrt(size), HᵀH = I. It need not be symmetric.

    Raises:
        ValueError: none of that size is known here.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    whole: Matrix = np.ones((1, 1))
    while odd <= size and size % odd == 0:
        core = _paley(odd)
        if core is not None:
            for _ in range((size // odd).bit_length() - 1):
                whole = np.kron(np.array([[1, 1], [1, -1]]), whole)
            return np.kron(whole, core) / np.sqrt(size)
        odd *= 2
    raise ValueError(f"no Hadamard matrix of size {size} is known here")


def _paley(size: int) -> Matrix | None:
    """Entries ±1; None where neither construction gives this size."""
    if size <= 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:size, :size]
    if size % 4:
        return None
    if _prime(size - 1) and (size - 1) % 4 == 3:
        skew = np.zeros((size, size))
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _residues(size - 1)
        return np.eye(size) + skew
    half = size // 2
    if _prime(half - 1) and (half - 1) % 4 == 1:
        symmetric = np.ones((half, half))
        symmetric[0, 0] = 0
        symmetric[1:, 1:] = _residues(half - 1)
        ones, turned = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(symmetric, ones) + np.kron(np.eye(half), turned)
    return None


def _residues(prime: int) -> Matrix:
    """Jacobsthal's matrix: 1 where i - j is a square modulo `prime`, -1 where it is none, 0 on the
    diagonal."""
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, prime)])
    index = np.arange(prime)
    return character[(index[:, None] - index[None]) % prime].astype(float)


def _prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))
