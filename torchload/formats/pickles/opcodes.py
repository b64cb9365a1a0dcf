"""Reading a pickle stream's opcodes before anything runs them: validity, bounds, and where it ends.

`check_stream` walks the opcodes once and refuses what no pickler writes or what would make the C unpickler allocate
out of proportion. It also rewrites the few opcodes whose effect could not be bounded from outside:

==============  =====================  ========================================================================
opcode          becomes                why
==============  =====================  ========================================================================
EMPTY_DICT      persistent id `None`   a C dict hashes any key it gets, and hashing a tuple nested through the memo
DICT            id ``(items, True)``   takes exponential time, or overflows the C stack; the reader's own mapping
                                       looks at a key first
EMPTY_SET       persistent id `False`  the same for sets
FROZENSET       id ``(items, False)``
BINBYTES, …     persistent id `int`    long payloads stay in the file: a pickled array costs no memory
FRAME           nothing                frame lengths no longer hold
==============  =====================  ========================================================================

A stream that contains the replacements itself only gets what they stand for: an empty dict, a run of its own bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from torchload.core.budget import Budget
from torchload.errors import CorruptCheckpointError, incomplete

if TYPE_CHECKING:
    from mmap import mmap

__all__ = ["Blob", "PickleStream", "check_stream"]

BLOB_BYTES = 4096  # payloads from this length on are left where they are
MAX_LINE_BYTES = 4096  # of a textual number; names and strings may be longer

# Memo indices below 2²¹ pass inside the run; larger ones are compared with the length of the stream.
_WITHOUT_ARGUMENT = b"(012NRbaesut]oQ)\x81\x85\x86\x87\x88\x89\x90\x92\x93\x94"
_RUN = re.compile(
    rb"(?:[Kqh].|r..[\x00-\x1f]\x00|[" + re.escape(_WITHOUT_ARGUMENT) + rb"]{1,1024}|[Jj]....|M..|G........){1,1024}",
    re.DOTALL,
)

# Opcode → width of the little-endian length that precedes its payload.
_LENGTH_WIDTHS = {
    ord("X"): 4,  # BINUNICODE
    0x8C: 1,  # SHORT_BINUNICODE
    0x8D: 8,  # BINUNICODE8
    ord("U"): 1,  # SHORT_BINSTRING
    ord("T"): 4,  # BINSTRING
    ord("C"): 1,  # SHORT_BINBYTES
    ord("B"): 4,  # BINBYTES
    0x8E: 8,  # BINBYTES8
    0x96: 8,  # BYTEARRAY8
    0x8A: 1,  # LONG1
    0x8B: 4,  # LONG4
}
_BLOBS = frozenset((ord("B"), 0x8E, 0x96, ord("T")))
_TEXT_LINES = {ord("V"): 1, ord("S"): 1, ord("P"): 1, ord("c"): 2, ord("i"): 2}
_TEXT_NUMBERS = frozenset(b"ILFg")
_REPLACEMENTS = {ord("}"): b"NQ", ord("d"): b"t\x88\x86Q", 0x8F: b"\x89Q", 0x91: b"t\x89\x86Q"}
_REFUSED = {
    0x82: "the extension registry (EXT1)",
    0x83: "the extension registry (EXT2)",
    0x84: "the extension registry (EXT4)",
    0x97: "out-of-band buffers (NEXT_BUFFER)",
    0x98: "out-of-band buffers (READONLY_BUFFER)",
}

# Upper bounds of what one opcode costs in bytes until the tree is finished, beyond `_COST_PER_BYTE` of its own length:
# a value takes 9 on the stack and 9 in its collection, besides itself. MARK stands for the tuple, list or object that
# it begins. Few classes, for each is counted by itself: in the pickle of 20,000 tensors that takes 7 ms; with a cost of
# its own for each opcode, it took 29.
_COST_PER_BYTE = 5
_OPCODE_COSTS = {
    260: b"]R\x81\x92io",
    72: b"(\x86\x87",
    62: b"\x85XUTCBVS\x8c\x8d\x8e",
    40: b"JMIFL\x8a\x8b",
    16: b"\x94N\x88\x89)2",
    8: b"Kh",
}
_CLASSES = {cost: bytes((number,)) for number, cost in enumerate(_OPCODE_COSTS, start=1)}
_CLASS_OF_OPCODE = bytes(
    next((number for number, opcodes in enumerate(_OPCODE_COSTS.values(), start=1) if opcode in opcodes), 0)
    for opcode in range(256)
)
_PART_BYTES = 1 << 18
_TEXT_COST = 48  # at least
_REPLACEMENT_COST = 400  # a dict or a set with the stand-in that it was
# The opcodes of a run: one and its argument, or several that have none.
_OPCODE = rb"(?s:([GJKMhjqr]|[^GJKMhjqr]+)(?:(?<=[Kqh]).|(?<=[Jjr]).{4}|(?<=M)..|(?<=G).{8}|(?<=[^GJKMhjqr])))"


class Blob(NamedTuple):
    """A long run of bytes that stays in the file.

    Attributes:
        offset: First byte, counted from the beginning of the data that was checked.
        size: Length in bytes.
        text: Whether a Python 2 ``str`` was pickled, rather than ``bytes``.
    """

    offset: int
    size: int
    text: bool


class PickleStream(NamedTuple):
    """A checked pickle.

    Attributes:
        code: What the unpickler may read: the opcodes, rewritten where the module's table says so.
        end: Position just past the STOP opcode in the data.
        blobs: The payloads that were left out of `code`; a persistent id that is an int is an index into them.
    """

    code: bytes | memoryview
    end: int
    blobs: tuple[Blob, ...]


def check_stream(
    data: bytes | bytearray | mmap, start: int = 0, *, name: str, budget: Budget | None = None
) -> PickleStream:
    r"""Check the opcodes of one pickle, from the byte `start` up to its STOP.

    Returns:
        The stream to unpickle. Every length and memo index in it is bounded by the data.

    Raises:
        CorruptCheckpointError: It is truncated, has an opcode that doesn't exist or that nothing safe can be made of,
            or would take memory out of all proportion.

    Example:
        >>> check_stream(b"\x80\x02K\x07.and more", name="example").end
        5
    """
    budget = budget or Budget()
    scan = _Scan(data, start, name, budget.left_bytes // _REPLACEMENT_COST)
    match, opcode, position = _RUN.match, 0, start
    length_widths, texts, most_texts = _LENGTH_WIDTHS, 0, budget.left_bytes // _TEXT_COST
    try:
        while True:
            run = match(data, position)
            if run is not None:
                position = run.end()
            opcode = data[position]
            width = length_widths.get(opcode)
            if width is None:
                if opcode == 0x2E:  # STOP
                    break
                position = scan.step(opcode, position)
            else:
                payload = position + 1 + width
                size = int.from_bytes(data[position + 1 : payload], "little")
                if size >= BLOB_BYTES and opcode in _BLOBS:
                    scan.take_blob(opcode, position, payload, size)
                texts += 1
                if texts > most_texts:  # known before the end, for each takes time
                    budget.spend(texts * _TEXT_COST, name)
                position = payload + size
    except (IndexError, OverflowError):  # a length of eight bytes may lie beyond what can be an index
        raise incomplete(name, f"its pickle runs past the end at byte {len(data)}") from None
    stream = scan.finish(position + 1)
    budget.spend(_cost_bytes(stream.code, scan.replacements, budget.left_bytes), name)
    return stream


class _Scan:
    """The rarer opcodes, and the pieces of the rewritten stream."""

    def __init__(self, data: bytes | bytearray | mmap, start: int, name: str, max_replacements: int) -> None:
        self.data = data
        self.start = start
        self.name = name
        self.max_replacements = max_replacements
        self.pieces: list[bytes] = []
        self.blobs: list[Blob] = []
        self.lists = 0
        self.kept = start  # up to where `pieces` covers the data

    def step(self, opcode: int, position: int) -> int:
        """Check one opcode that a run doesn't swallow; returns the position of the next."""
        data = self.data
        replacement = _REPLACEMENTS.get(opcode)
        if replacement is not None:
            self.replace(position, position + 1, replacement)
            return position + 1
        if opcode == 0x6C:  # LIST, as protocol 0 has it
            self.lists += 1
            self.check_amount(position)
            return position + 1
        if opcode in _TEXT_LINES:
            for _ in range(_TEXT_LINES[opcode]):
                position = self.line_end(position + 1)
            return position + 1
        if opcode in _TEXT_NUMBERS or opcode == 0x70:  # PUT
            end = self.line_end(position + 1)
            if end - position > MAX_LINE_BYTES:
                self.refuse(f"has a number of {end - position} digits", position)
            if opcode == 0x70:
                self.check_memo_index(position, bytes(data[position + 1 : end]))
            return end + 1
        if opcode == 0x72:  # LONG_BINPUT
            self.check_memo_index(position, int.from_bytes(data[position + 1 : position + 5], "little"))
            return position + 5
        if opcode == 0x80:  # PROTO
            if data[position + 1] > 5:
                self.refuse(f"is written in pickle protocol {data[position + 1]}, and 5 is the newest known", position)
            return position + 2
        if opcode == 0x95:  # FRAME
            if position + 9 + int.from_bytes(data[position + 1 : position + 9], "little") > len(data):
                raise IndexError
            self.replace(position, position + 9, b"")
            return position + 9
        if _begins_run(data, position):
            return position
        if opcode in b"KqhJjMG":  # its argument is missing
            raise IndexError
        if opcode in _REFUSED:
            self.refuse(f"uses {_REFUSED[opcode]}, which no checkpoint needs", position)
        self.refuse(f"has no valid opcode (0x{opcode:02x})", position)

    def line_end(self, position: int) -> int:
        end = self.data.find(b"\n", position)
        if end < 0:
            raise IndexError
        return end

    def check_memo_index(self, position: int, index: int | bytes) -> None:
        # A pickler numbers its memo from 0 or 1 and needs two bytes or more per entry.
        limit = (len(self.data) - self.start) // 2 + 256
        try:
            number = int(index)
        except ValueError:
            number = -1
        if not 0 <= number < limit:
            self.refuse(f"gives an object the number {index!r}, though it has room for {limit:,} objects", position)

    def replace(self, position: int, end: int, replacement: bytes) -> None:
        self.pieces.append(bytes(self.data[self.kept : position]))
        self.pieces.append(replacement)
        self.kept = end
        self.check_amount(position)

    @property
    def replacements(self) -> int:
        """How many opcodes begin a dict, a set, or a list as protocol 0 has it."""
        return len(self.pieces) // 2 + self.lists

    def check_amount(self, position: int) -> None:
        if self.replacements > self.max_replacements:
            self.refuse("would make more objects than a checkpoint of this size can hold", position)

    def take_blob(self, opcode: int, position: int, payload: int, size: int) -> None:
        if payload + size > len(self.data):
            raise IndexError
        self.replace(position, payload + size, b"J" + len(self.blobs).to_bytes(4, "little") + b"Q")
        self.blobs.append(Blob(payload, size, text=opcode == 0x54))

    def finish(self, end: int) -> PickleStream:
        if not self.pieces:
            return PickleStream(memoryview(self.data)[self.start : end], end, ())
        self.pieces.append(bytes(self.data[self.kept : end]))
        return PickleStream(b"".join(self.pieces), end, tuple(self.blobs))

    def refuse(self, what: str, position: int) -> NoReturn:
        raise CorruptCheckpointError(
            f"{self.name}: the pickle at byte {self.start} {what} (byte {position}). It is damaged or made to do harm.",
            path=self.name,
        )


def _begins_run(data: bytes | bytearray | mmap, position: int) -> bool:
    """Whether the run before was as long as they may be, and another one begins."""
    return _RUN.match(data, position, position + 9) is not None


def _cost_bytes(code: bytes | memoryview, replacements: int, left_bytes: int) -> int:
    """An upper bound of what the objects of a stream take."""
    fixed = _COST_PER_BYTE * len(code) + _REPLACEMENT_COST * replacements
    if (cost := fixed + _costs_of(code)) <= left_bytes // 2:
        return cost
    return fixed + _costs_of(_without_arguments(code))  # bytes of names and numbers were taken for opcodes


def _costs_of(opcodes: bytes | bytearray | memoryview) -> int:
    """What every byte would cost if it was an opcode."""
    # Not with torch: its threads would not be there in a process that was forked.
    classified = (part.translate(_CLASS_OF_OPCODE) for part in _parts(opcodes))
    return sum(part.count(number) * cost for part in classified for cost, number in _CLASSES.items())


def _parts(code: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """A memoryview can't count; its bytes are copied a few at a time."""
    for start in range(0, len(code), _PART_BYTES):
        yield bytes(code[start : start + _PART_BYTES])


def _without_arguments(code: bytes | memoryview) -> bytearray:
    """The opcodes of a stream that was checked, up to its STOP."""
    code = bytes(code)
    opcodes = bytearray()
    match, position = _RUN.match, 0
    while True:
        run = match(code, position)
        if run is not None:
            opcodes += b"".join(re.findall(_OPCODE, run[0]))
            position = run.end()
        opcode = code[position]
        if opcode in _LENGTH_WIDTHS:
            payload = position + 1 + _LENGTH_WIDTHS[opcode]
            end = payload + int.from_bytes(code[position + 1 : payload], "little")
        elif opcode in _TEXT_LINES or opcode in _TEXT_NUMBERS or opcode == 0x70:  # PUT
            end = position + 1
            for _ in range(_TEXT_LINES.get(opcode, 1)):
                end = code.index(b"\n", end) + 1
        elif opcode == 0x2E:  # STOP
            return opcodes
        elif _begins_run(code, position):
            continue
        else:
            end = position + {0x80: 2, 0x72: 5}.get(opcode, 1)  # PROTO, LONG_BINPUT
        opcodes.append(opcode)
        position = end
