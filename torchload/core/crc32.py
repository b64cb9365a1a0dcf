"""Arithmetic of CRC-32 checksums: polynomials over GF(2), modulo that of the checksum."""

from __future__ import annotations

from functools import lru_cache

__all__ = ["combine_crc32"]

_POLYNOMIAL = 0xEDB88320


@lru_cache(maxsize=64)  # arrays of one form have headers of one form
def combine_crc32(first: int, second: int, second_nbytes: int) -> int:
    """The CRC-32 of two runs of bytes, one after the other, from that of each.

    Example:
        >>> import zlib
        >>> combine_crc32(zlib.crc32(b"check"), zlib.crc32(b"point"), 5) == zlib.crc32(b"checkpoint")
        True
    """
    if not first:
        return second  # nothing comes before it, as a rule; the formula would give the same
    # Appending n bytes multiplies the polynomial of the first by x^(8n), modulo the CRC's own.
    return _multiply(_power_of_x(8 * second_nbytes), first) ^ second


@lru_cache(maxsize=64)
def _power_of_x(exponent: int) -> int:
    power, square = 1 << 31, 1 << 30  # x^0 and x^1: the highest bit is the lowest coefficient
    while exponent:
        if exponent & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def _multiply(left: int, right: int) -> int:
    """Product of two polynomials over GF(2), modulo the CRC's."""
    product = 0
    bit = 1 << 31
    while bit:
        if left & bit:
            product ^= right
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)
        bit >>= 1
    return product
