"""What a file is when it is no checkpoint: named, with what to do about it.

`KINDS` is the table: one row each, tried in order, the exact signatures before the guesses.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torchload.core.source import Source
from torchload.core.text import format_bytes
from torchload.errors import GET_IT_AGAIN, CheckpointFormatError
from torchload.formats.files import is_tar, is_zip
from torchload.formats.locate import UNFINISHED_SUFFIXES

__all__ = ["KINDS", "Foreign", "describe", "describe_zip"]

_SAMPLE_BYTES = 4096
_SAMPLES = 64

_OTHER_FRAMEWORK = "Its weights belong to another framework; convert the model to PyTorch first."
_UNPACK = "Unpack it and give the path of the checkpoint inside."
_NO_WEIGHTS = "Check the path: this is not a file that holds weights."
_DOWNLOAD_AGAIN = "Download the file again, and look at the address: it answered with this instead of the file."


@dataclass(frozen=True, slots=True)
class Foreign:
    """One kind of file that is no checkpoint.

    Attributes:
        found: Its name, with an article where a sentence needs one: ``"an HTML page"``.
        recognizes: Whether a file may be one, from its first bytes.
        advice: What to do, as a sentence.
        detail: What more can be said about this one, from its first bytes, to follow its name; may be empty.
        confirms: Whether it is one, from the rest of the file, where its first bytes don't tell.
    """

    found: str
    recognizes: Callable[[bytes], bool]
    advice: str
    detail: Callable[[bytes], str] | None = None
    confirms: Callable[[Source], bool] | None = None


def describe(source: Source, head: bytes, path: str) -> CheckpointFormatError:
    """The error that says what a file is instead of a checkpoint."""
    for kind in KINDS:
        if kind.recognizes(head) and (kind.confirms is None or kind.confirms(source)):
            # Whoever made a link may have no right to read what it leads to, and would read it in the message.
            detail = kind.detail(head) if kind.detail and not os.path.islink(path) else ""
            article, _, bare = kind.found.partition(" ")
            found = bare if article in {"a", "an"} else kind.found
            message = f"{path} is {kind.found}{detail}, not a checkpoint. {kind.advice}"
            return CheckpointFormatError(message + _unfinished(path), path=path, found=found)
    return CheckpointFormatError(
        f"{path} ({source.size:,} bytes) is not a checkpoint in any format known here"
        + ("" if os.path.islink(path) else f"; it begins with the bytes {head[:16].hex(' ')}")
        + f". Expected are files of torch.save or safetensors.{_unfinished(path)}",
        path=path,
    )


def _magic(*signatures: bytes, at: int = 0) -> Callable[[bytes], bool]:
    return lambda head: any(head.startswith(signature, at) for signature in signatures)


def _unfinished(path: str) -> str:
    if path.endswith(UNFINISHED_SUFFIXES):
        return " By its name it is a download that has not finished."
    for suffix in UNFINISHED_SUFFIXES:
        if os.path.exists(path + suffix):
            return f" {os.path.basename(path)}{suffix} beside it says that the download has not finished."
    return ""


# ---------------------------------------------------------------------------------------------------- text of all kinds


def _text(head: bytes) -> str | None:
    """The head as text, or ``None`` where it is none."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(head) < _SAMPLE_BYTES or error.start < len(head) - 4:  # not just a character cut in two
            return None
        text = head[: error.start].decode("utf-8-sig")
    readable = all(character.isprintable() or character in "\t\r\n\f" for character in text)
    return text if readable else None


def _is_html(head: bytes) -> bool:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--", b"<title", b"<meta"))


def _is_xml(head: bytes) -> bool:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith((b"<?xml", b"<Error>")) or re.match(rb"<\w+[\s>]", start) is not None


def _is_json(head: bytes) -> bool:
    text = _text(head)
    return text is not None and re.match(r'\s*(?:\{\s*["}]|\[\s*[\[{"\d\]-])', text) is not None


def _html_title(head: bytes) -> str:
    match = re.search(rb"<title[^>]*>(.*?)</title", head, re.IGNORECASE | re.DOTALL)
    return _quoted(match[1]) if match else ""


def _xml_code(head: bytes) -> str:
    match = re.search(rb"<(?:Message|Code)>(.*?)</", head, re.DOTALL)
    return _quoted(match[1]) if match else ""


def _json_error(head: bytes) -> str:
    try:
        value = json.loads(head)
    except (ValueError, RecursionError):
        return ""
    for name in ("error", "message", "detail", "msg", "errors"):
        if isinstance(value, dict) and value.get(name):
            return _quoted(str(value[name]).encode(errors="replace"))
    return ""


def _first_line(head: bytes) -> str:
    return _quoted((head.strip().splitlines() or [b""])[0])


def _quoted(text: bytes) -> str:
    words = " ".join(text.decode("utf-8", "replace").split())
    return f" ({words[:77] + '...' if len(words) > 80 else words!r})" if words else ""


def _lfs_detail(head: bytes) -> str:
    size = re.search(rb"^size (\d{1,18})$", head, re.MULTILINE)
    oid = re.search(rb"^oid (\w+:[0-9a-f]{8,64})$", head, re.MULTILINE)
    parts = []
    if size:
        parts.append(f"the real file has {format_bytes(int(size[1]))}")
    if oid:
        parts.append(f"oid {oid[1].decode()[:19]}...")
    return f" ({', '.join(parts)})" if parts else ""


# --------------------------------------------------------------------------------------------- archives and the rest


def _compressed_detail(head: bytes) -> str:
    """What is inside, as far as its first bytes tell."""
    inside = _decompressed_head(head)
    if is_zip(inside):
        return " of a zip file, perhaps of a checkpoint"
    if is_tar(inside):
        return " of a tar archive"
    if inside.startswith(b"\x80") and inside[1:2] in b"\x02\x03\x04\x05":
        return " of a pickle, perhaps of a checkpoint"
    return ""


def _decompressed_head(head: bytes) -> bytes:
    """At most 4 KiB of what a gzip, bzip2 or xz stream holds; nothing where it can't be told."""
    try:
        if head.startswith(b"\x1f\x8b"):
            import zlib

            return zlib.decompressobj(wbits=31).decompress(head, _SAMPLE_BYTES)
        if head.startswith(b"BZh"):
            import bz2

            return bz2.BZ2Decompressor().decompress(head, _SAMPLE_BYTES)
        if head.startswith(b"\xfd7zXZ"):
            import lzma

            return lzma.LZMADecompressor(memlimit=64 * 1024 * 1024).decompress(head, _SAMPLE_BYTES)
    except Exception:  # noqa: BLE001 - zlib, bz2 and lzma each have an error of their own; a guess may fail
        return b""
    return b""


def _is_onnx(head: bytes) -> bool:
    # ModelProto: field 1 (ir_version, 3 or more), then one of its text fields or the graph.
    return len(head) > 8 and head[0] == 0x08 and 3 <= head[1] <= 32 and head[2] in {0x12, 0x1A, 0x22, 0x32, 0x3A, 0x42}


def _ends_as_leveldb(source: Source) -> bool:
    # A LevelDB table ends in this number.
    return source.size >= 48 and source.read(source.size - 8, 8) == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def _ends_as_zip(source: Source) -> bool:
    # The end record of an archive without a comment, and where it says the directory is, a directory.
    if source.size < 100 or source.read(source.size - 22, 4) != b"PK\x05\x06":
        return False
    offset = int.from_bytes(source.read(source.size - 6, 4), "little")
    return offset + 26 < source.size and source.read(offset, 4) == b"PK\x01\x02"


def _is_msgpack_map(head: bytes) -> bool:
    # A map (at most 15 entries, 16-bit or 32-bit count) whose first key is a short readable text.
    match = re.match(rb"(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa1-\xbf]|\xd9.)([A-Za-z_][\w./-]{2,})", head, re.DOTALL)
    return match is not None


def _samples_are_zero(source: Source) -> bool:
    step = max(source.size // _SAMPLES, _SAMPLE_BYTES)
    return not any(
        any(source.read(offset, min(_SAMPLE_BYTES, source.size - offset))) for offset in range(0, source.size, step)
    )


# What zip archives without a torch pickle are: name, whether the names of its records say so, advice.
_ZIP_KINDS: tuple[tuple[str, Callable[[frozenset[str]], bool], str], ...] = (
    ("a Keras model", lambda names: {"config.json", "model.weights.h5"} <= names, _OTHER_FRAMEWORK),
    (
        "a stable-baselines3 agent",
        lambda names: "_stable_baselines3_version" in names,
        "Unpack it and give the path of policy.pth inside.",
    ),
    (
        "a TorchScript archive of torch < 1.4",
        lambda names: (
            any(name.endswith("/model.json") for name in names) and any("/tensors/" in name for name in names)
        ),
        "Load it with torch.jit.load and save its state_dict() with torch.save.",
    ),
    ("an office document", lambda names: bool({"[Content_Types].xml", "mimetype"} & names), _NO_WEIGHTS),
    ("a Java archive or Android package", lambda names: "META-INF/MANIFEST.MF" in names, _NO_WEIGHTS),
    (
        "a Python package",
        lambda names: any(name.endswith((".dist-info/METADATA", ".egg-info/PKG-INFO")) for name in names),
        _NO_WEIGHTS,
    ),
    (
        "a zip archive with checkpoints inside",
        lambda names: any(name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors")) for name in names),
        _UNPACK,
    ),
)


def describe_zip(names: Iterable[str], path: str) -> CheckpointFormatError | None:
    """The error that says what a zip archive is, or ``None`` where the names of its records don't tell."""
    known = frozenset(names)
    for kind, recognizes, advice in _ZIP_KINDS:
        if recognizes(known):
            message = f"{path} is {kind}, not a file of torch.save. {advice}"
            return CheckpointFormatError(message, path=path, found=kind.split(" ", 1)[1])
    return None


KINDS: tuple[Foreign, ...] = (
    Foreign(
        "a git-lfs pointer",
        _magic(b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/"),
        "Fetch the file itself: run 'git lfs pull' in the repository, or download it from the website.",
        _lfs_detail,
    ),
    Foreign(
        "a git-annex pointer",
        _magic(b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/"),
        "Fetch the file itself: run 'git annex get' in the repository.",
    ),
    Foreign(
        "a zip archive whose beginning is damaged or was replaced",
        lambda head: True,
        "Its directory, at the end, is whole: it may be a checkpoint. " + GET_IT_AGAIN,
        confirms=_ends_as_zip,
    ),
    Foreign("an HTML page", _is_html, _DOWNLOAD_AGAIN, _html_title),
    Foreign("an XML document", _is_xml, _DOWNLOAD_AGAIN, _xml_code),
    Foreign("a gzip file", _magic(b"\x1f\x8b"), _UNPACK, _compressed_detail),
    Foreign("a bzip2 file", _magic(b"BZh"), _UNPACK, _compressed_detail),
    Foreign("an xz file", _magic(b"\xfd7zXZ\x00"), _UNPACK, _compressed_detail),
    Foreign("a Zstandard file", _magic(b"\x28\xb5\x2f\xfd"), _UNPACK),
    Foreign("an LZ4 file", _magic(b"\x04\x22\x4d\x18"), _UNPACK),
    Foreign("a 7-Zip archive", _magic(b"7z\xbc\xaf\x27\x1c"), _UNPACK),
    Foreign("a RAR archive", _magic(b"Rar!\x1a\x07"), _UNPACK),
    Foreign("a tar archive", is_tar, _UNPACK),
    Foreign("an empty zip archive", _magic(b"PK\x05\x06"), _DOWNLOAD_AGAIN),
    Foreign("a part of a split zip archive", _magic(b"PK\x07\x08"), "Join the parts and unpack them."),
    Foreign("a GGUF file", _magic(b"GGUF"), "It is made for llama.cpp; give the PyTorch or safetensors files instead."),
    Foreign(
        "a GGML file",
        _magic(b"lmgg", b"fmgg", b"tjgg", b"algg"),
        "It is made for llama.cpp or whisper.cpp; give the PyTorch or safetensors files instead.",
    ),
    Foreign("an HDF5 file", _magic(b"\x89HDF\r\n\x1a\n"), "Keras and TensorFlow save such files. " + _OTHER_FRAMEWORK),
    Foreign("a TensorFlow Lite model", _magic(b"TFL3", at=4), _OTHER_FRAMEWORK),
    Foreign("a TensorFlow SavedModel", _magic(b"\x08\x01\x12"), _OTHER_FRAMEWORK),
    Foreign(
        "an ONNX model", _is_onnx, "It is made for inference runtimes; give the PyTorch file it was exported from."
    ),
    Foreign("a TensorFlow checkpoint index", lambda head: len(head) >= 48, _OTHER_FRAMEWORK, confirms=_ends_as_leveldb),
    Foreign("an MXNet parameter file", _magic(b"\x12\x01\0\0\0\0\0\0"), _OTHER_FRAMEWORK),
    Foreign("a Lua Torch7 file", _magic(b"\x04\0\0\0\x01\0\0\0\x03\0\0\0V 1", b"4\n1\n3\nV 1\n"), _OTHER_FRAMEWORK),
    Foreign(
        "a numpy file of a pickled object",
        lambda head: head.startswith(b"\x93NUMPY") and b"'descr': '|O'" in head[:256],
        "If you trust where it comes from, numpy.load(path, allow_pickle=True)[()] gives the object (a dict of arrays, "
        "perhaps); save that with numpy.savez(path, **arrays), which is read here.",
    ),
    Foreign("a numpy array", _magic(b"\x93NUMPY"), "It holds one array without a name; load it with numpy.load."),
    Foreign("a MATLAB file", _magic(b"MATLAB 5.0 MAT-file"), _NO_WEIGHTS),
    Foreign("a PNG image", _magic(b"\x89PNG\r\n\x1a\n"), _NO_WEIGHTS),
    Foreign("a JPEG image", _magic(b"\xff\xd8\xff"), _NO_WEIGHTS),
    Foreign("a GIF image", _magic(b"GIF87a", b"GIF89a"), _NO_WEIGHTS),
    Foreign("a PDF document", _magic(b"%PDF-"), _NO_WEIGHTS),
    Foreign("a RIFF file (WebP, WAV or AVI)", _magic(b"RIFF"), _NO_WEIGHTS),
    Foreign("a program or library (ELF)", _magic(b"\x7fELF"), _NO_WEIGHTS),
    Foreign("a Windows program or library", _magic(b"MZ"), _NO_WEIGHTS),
    Foreign("an SQLite database", _magic(b"SQLite format 3\0"), _NO_WEIGHTS),
    Foreign("a Parquet file", _magic(b"PAR1"), _NO_WEIGHTS),
    Foreign("an Arrow file", _magic(b"ARROW1"), _NO_WEIGHTS),
    Foreign("a msgpack file (Flax)", _is_msgpack_map, _OTHER_FRAMEWORK),
    Foreign(
        "filled with zeros",
        lambda head: not any(head),
        "Space was reserved for it, but the data never arrived. " + GET_IT_AGAIN,
        confirms=_samples_are_zero,
    ),
    Foreign("a JSON file", _is_json, "Give the file that holds the weights, or its folder.", _json_error),
    Foreign("a text file", lambda head: _text(head) is not None, _NO_WEIGHTS, _first_line),
)
