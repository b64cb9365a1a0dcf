"""The errors torchload raises.

Every one of them derives from `TorchLoadError` and from the builtin a caller would expect::

    TorchLoadError
    ├── CheckpointNotFoundError    (FileNotFoundError)  no such file or folder, or nothing to load in it
    ├── CheckpointFormatError      (ValueError)         not a checkpoint, or one that can't be read here
    │   └── CorruptCheckpointError                      truncated, damaged, or hostile
    ├── AmbiguousCheckpointError   (ValueError)         several answers fit; the message lists them
    ├── IncompatibleCheckpointError(RuntimeError)       the checkpoint does not fit the model
    ├── CastOverflowError          (OverflowError)      a finite value would become inf in the new dtype
    └── DeviceError                (RuntimeError)       the device isn't there, or has too little memory

What a careful person would want to know and is no error is a `CheckpointWarning`, given before a byte is written.

Errors carry their data as attributes and survive pickling. Each message says what was found, what was
expected, and what to do.

What is raised inside says just the problem. A `Boundary` stands around each public function: there the checkpoint's
name is added, in place of the words "The checkpoint" where the message begins with them, and what became of the model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from torchload.core.text import printable, printable_lines

__all__ = [
    "AmbiguousCheckpointError",
    "CastOverflowError",
    "CheckpointFormatError",
    "CheckpointNotFoundError",
    "CheckpointWarning",
    "CorruptCheckpointError",
    "DeviceError",
    "IncompatibleCheckpointError",
    "TorchLoadError",
]

Shape = tuple[int, ...]


class CheckpointWarning(UserWarning):
    """Something that a careful person would want to know of a load that goes on all the same.

    It is given when everything has been planned and nothing was written: where warnings are errors (``-W error``), the
    load is refused and the model is as it was.
    """


def _on_one_line(message: str, name: str | None) -> str:
    return message.replace(name, printable(name, None)) if name and "\n" in name else message


class TorchLoadError(Exception):
    """Base of all errors that torchload raises on purpose.

    Attributes:
        message: The whole text, as `str()` gives it.
        path: The checkpoint as the caller named it, or ``None`` where no file is involved.
        written: Names of the model's tensors that had already been overwritten when the error was raised.
            Empty unless data failed during an in-place transfer without ``atomic=True``.
    """

    def __init__(self, message: str, *, path: str | None = None, written: Iterable[str] = ()) -> None:
        message = printable_lines(_on_one_line(message, path))  # names in it come from the file
        super().__init__(message)
        self.message = message
        self.path = path
        self.written: tuple[str, ...] = tuple(written)
        self._has_left = False

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only data lives in __dict__; the default reduction would call __init__ with the message alone,
        # which is all the constructors require.
        return (type(self), (self.message,), self.__dict__)

    def _leave(self, path: str | None, state: str) -> None:
        """Add what the inside doesn't know; once, though an error may leave several calls within one another."""
        if self._has_left:
            return
        self._has_left = True
        self._name(path)
        if state:
            head, line_break, rest = self.message.partition("\n")
            self.message = f"{head} {state}{line_break}{rest}"
        self.args = (self.message,)

    def _name(self, path: str | None) -> None:
        """Say which checkpoint this is about, where nobody has yet."""
        if self.path is None and path is not None:
            self.path = path
            colon = "" if self.message.startswith(_SUBJECT) else ": "
            self.message = printable(path, None) + colon + self.message.removeprefix(_SUBJECT)
            self.args = (self.message,)


class CheckpointNotFoundError(TorchLoadError, FileNotFoundError):
    """The path does not exist, or is a folder that holds no checkpoint."""


class CheckpointFormatError(TorchLoadError, ValueError):
    """The file is not a checkpoint, or a kind that torchload can't read.

    Attributes:
        found: What the file turned out to be (``"git-lfs pointer"``, ``"HTML page"``, …), or ``None``.
    """

    def __init__(
        self, message: str, *, path: str | None = None, written: Iterable[str] = (), found: str | None = None
    ) -> None:
        super().__init__(message, path=path, written=written)
        self.found = found


class CorruptCheckpointError(CheckpointFormatError):
    """The file contradicts itself: truncated, failed checksum, impossible offsets, or made to do harm."""


GET_IT_AGAIN = "Download or copy it again."


def damaged(path: str | None, what: str) -> CorruptCheckpointError:
    """The error of a file, or of the whole checkpoint, that contradicts itself; `what` it does is a clause."""
    return CorruptCheckpointError(f"{path or _SUBJECT} is damaged: {what}. {GET_IT_AGAIN}", path=path)


def incomplete(path: str | None, what: str) -> CorruptCheckpointError:
    """The error of a file, or of the whole checkpoint, that ends too early; `what` is missing is a clause."""
    return CorruptCheckpointError(f"{path or _SUBJECT} is incomplete: {what}. {GET_IT_AGAIN}", path=path)


def refused(path: str, what: str) -> CorruptCheckpointError:
    """The error of a file that nobody honest writes; what it does follows its name."""
    return CorruptCheckpointError(f"{path} {what}. It is damaged or made to do harm, and isn't read.", path=path)


class AmbiguousCheckpointError(TorchLoadError, ValueError):
    """More than one part of the checkpoint fits the model equally well.

    Attributes:
        candidates: What fits, in the form that `argument` accepts.
        argument: Name of the `smart_load` argument that picks one (``"key"``, ``"prefix"``, ``"path"``).
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        candidates: Iterable[str] = (),
        argument: str = "key",
    ) -> None:
        super().__init__(message, path=path)
        self.candidates: tuple[str, ...] = tuple(candidates)
        self.argument = argument


class IncompatibleCheckpointError(TorchLoadError, RuntimeError):
    """The checkpoint does not fit the model. Nothing was loaded.

    Attributes:
        missing_keys: Model names that the checkpoint does not fill, in the model's order.
        unexpected_keys: Checkpoint names that the model has no place for, in the checkpoint's order.
        mismatched: Model name → (shape in the file, shape in the model).
        problems: Any other obstacle, one sentence each.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        missing_keys: Iterable[str] = (),
        unexpected_keys: Iterable[str] = (),
        mismatched: Mapping[str, tuple[Shape, Shape]] | None = None,
        problems: Iterable[str] = (),
    ) -> None:
        super().__init__(message, path=path)
        self.missing_keys: list[str] = list(missing_keys)
        self.unexpected_keys: list[str] = list(unexpected_keys)
        self.mismatched: dict[str, tuple[Shape, Shape]] = dict(mismatched or {})
        self.problems: list[str] = list(problems)


class CastOverflowError(TorchLoadError, OverflowError):
    """A finite value of the checkpoint would become infinite in the requested dtype.

    Attributes:
        tensor: Name of the tensor in the model.
        largest: The largest finite magnitude found in it.
        source_dtype, target_dtype: Names of the two dtypes, such as ``"float32"`` and ``"float16"``.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        written: Iterable[str] = (),
        tensor: str = "",
        largest: float = float("nan"),
        source_dtype: str = "",
        target_dtype: str = "",
    ) -> None:
        super().__init__(_on_one_line(message, tensor), path=path, written=written)
        self.tensor = tensor
        self.largest = largest
        self.source_dtype = source_dtype
        self.target_dtype = target_dtype


class DeviceError(TorchLoadError, RuntimeError):
    """The requested device does not exist here, or has too little free memory for the model.

    Attributes:
        device: The device as requested.
        available: The devices that are there.
    """

    def __init__(
        self, message: str, *, path: str | None = None, device: str = "", available: Iterable[str] = ()
    ) -> None:
        super().__init__(message, path=path)
        self.device = device
        self.available: tuple[str, ...] = tuple(available)


_SUBJECT = "The checkpoint"
_SHOWN = 3
_called: ContextVar[str] = ContextVar("called", default="smart_load")


def advised(arguments: str) -> str:
    """Advice, spelled as the call that the user made, with these arguments in it.

    Example:
        >>> advised("skip=['fc.*']")
        "smart_load(..., skip=['fc.*'])"
    """
    return f"{_called.get()}(..., {arguments})"


class Boundary:
    """Where errors leave the library: a context manager around the work of a public function.

    Attributes:
        path: The checkpoint as the caller named it, to be set as soon as it is known.

    Example:
        >>> with Boundary(written=list) as boundary:
        ...     boundary.path = "model.pth"
        ...     raise TorchLoadError("The checkpoint holds no tensors.")
        Traceback (most recent call last):
        torchload.errors.TorchLoadError: model.pth holds no tensors. Nothing was loaded; the model is unchanged.
    """

    def __init__(
        self,
        written: Callable[[], Sequence[str]] | None = None,
        unchanged: str = "Nothing was loaded; the model is unchanged.",
        called: str = "smart_load",
    ) -> None:
        """Ready to be entered.

        Args:
            written: Gives the names of what has changed by now; ``None`` where the function changes nothing.
            unchanged: What to say where that is nothing.
            called: Name of the public function, for advice.
        """
        self.path: str | None = None
        self._called = called
        self._written, self._unchanged = written, unchanged

    def __enter__(self) -> Boundary:
        self._before = _called.set(self._called)
        return self

    def warn(self, texts: Iterable[str]) -> None:
        """Warn who called the public function in whose body this is called, through one wrapper."""
        for text in texts:
            warnings.warn(printable(f"{self.path}: {text}", None), CheckpointWarning, stacklevel=4)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        _called.reset(self._before)
        if error is None:
            return
        state = ""
        if self._written is not None:
            names = tuple(self._written())
            with contextlib.suppress(Exception):  # an object of somebody's own, without room for it
                error.written = names  # type: ignore[attr-defined]
            state = _changed(names) if names else self._unchanged
            if names and not isinstance(error, TorchLoadError) and hasattr(error, "add_note"):  # Python 3.11
                error.add_note(state)
        if isinstance(error, TorchLoadError):
            error._leave(self.path, state)


def _changed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_SHOWN])
    more = ", …; error.written has all" if len(names) > _SHOWN else ""
    what = f"{len(names):,} of its tensors were" if len(names) > 1 else "a tensor of it was"
    return f"The model has changed: {what} written to ({shown}{more})."
