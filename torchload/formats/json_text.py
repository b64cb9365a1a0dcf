"""JSON from a stranger: one object, read strictly and within bounds.

Python's parser is lenient where a format must not be (duplicate keys, UTF-16, lone surrogates) and lets a small text
grow into a hundred times its size in objects. `parse_object` refuses both.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from torchload.errors import GET_IT_AGAIN, CorruptCheckpointError

__all__ = ["parse_object"]

# While it is parsed, a value takes about 50 bytes and a name with its value about 300. These bounds keep the most
# hostile text below 256 MiB, and leave room for 200,000 tensors in one file: the largest published models have half as
# many in all their shards together.
_MAX_VALUES = 3_000_000
_MAX_NAMES = 850_000
# One character beyond the basic plane makes Python store every character of a string in four bytes.
_MAX_NON_ASCII_BYTES = 16 * 1024 * 1024
_MAX_DIGITS = 40
_LONG_NUMBER = b"0" * (_MAX_DIGITS + 1)
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_MINUS_ZERO = re.compile(rb"-0(?![.\d])")


def parse_object(data: bytes | bytearray, what: str, path: str) -> dict[str, Any]:
    """The JSON object that `data` spells, and nothing else.

    Args:
        data: UTF-8 text, possibly hostile; the caller bounds its length. A `bytearray` is empty afterwards.
        what: What the text is, for messages: ``"header"``, ``"index"``.
        path: The file it comes from, for messages.

    Returns:
        The object. Objects inside it are dicts too, with unique keys at every level.

    Raises:
        CorruptCheckpointError: Not UTF-8, not JSON, not an object, a duplicate key, nested too deep, or made to
            exhaust memory.

    Example:
        >>> parse_object(b'{"a": [1, 2]}', "header", "model.safetensors")
        {'a': [1, 2]}
    """

    def refuse(problem: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"The {what} of {path} {problem}. {GET_IT_AGAIN}", path=path)

    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > _MAX_VALUES:
        raise refuse(f"lists about {values:,} values; more than {_MAX_VALUES:,} are not read")
    names = data.count(b":")
    if names > _MAX_NAMES:
        raise refuse(f"lists about {names:,} names; more than {_MAX_NAMES:,} are not read")
    escapes = b"\\u" in data
    if len(data) > _MAX_NON_ASCII_BYTES and (escapes or not data.isascii()):
        raise refuse(f"is {len(data):,} bytes of text beyond ASCII, which is not read")
    odd = escapes or _LONG_NUMBER in data.translate(_DIGITS_AS_ZEROS) or _MINUS_ZERO.search(data) is not None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"is not UTF-8 text (byte {error.start})") from None
    if isinstance(data, bytearray):
        data.clear()  # text and objects are enough at a time
    try:
        # Without Python functions for names and integers, the header of 20,000 tensors takes 17 ms instead of 50.
        parsed = None if odd else json.loads(text, parse_constant=_no_number)
        # Of two equal names Python keeps one. There is a colon for each: if as many names are left, all differ.
        if odd or (isinstance(parsed, dict) and _count_names(parsed) != names):
            parsed = None  # gone before it is made again
            hook = _unique_and_encodable if escapes else _unique
            parsed = json.loads(text, object_pairs_hook=hook, parse_int=_integer, parse_constant=_no_number)
    except _RefusedKeyError as error:
        raise refuse(str(error)) from None
    except RecursionError:
        raise refuse("is nested too deep") from None
    except ValueError as error:
        raise refuse(f"is not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise refuse(f"is not a JSON object but a {type(parsed).__name__}")
    return parsed


class _RefusedKeyError(Exception):
    """Ends the parse from inside a hook; the message completes a sentence about the text."""


def _count_names(parsed: dict[str, Any]) -> int:
    """How many names an object and the objects in it have; those further inside are not counted."""
    return len(parsed) + sum([len(value) for value in parsed.values() if type(value) is dict])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedKeyError(f"holds the name {key!r} twice")
            seen.add(key)
    return result


def _unique_and_encodable(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
        try:
            key.encode()
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError:
            raise _RefusedKeyError(f"holds a lone surrogate at {key!a}") from None
    return _unique(pairs)


def _integer(digits: str) -> int:
    # Python < 3.10.7 converts a number of any length, in quadratic time; later versions may be told to.
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    if digits == "-0":
        raise ValueError("the number -0")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no number in JSON")
