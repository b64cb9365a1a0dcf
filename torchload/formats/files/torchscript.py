"""TorchScript archives: what `torch.jit.save` writes.

The container is that of `torch.save`, but the pickle holds a tree of scripted modules whose attributes stand side by
side: a parameter, a buffer and a tensor that is neither look the same. Which is which, the source text of their classes
tells, in ``code/``: each class begins with the lists ``__parameters__`` and ``__buffers__``. Those lines are found
with a regular expression; nothing is compiled.

The state dict is the one that ``torch.jit.load(path).state_dict()`` gives. So it holds buffers that were not
persistent, because scripting forgets that; and beyond it, a buffer declared as ``Optional[Tensor]``, which torch.jit
overlooks although the model has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torchload.core.checkpoint import Checkpoint, Container, OpaqueTensor, Record, TensorEntry
from torchload.errors import CheckpointFormatError, damaged
from torchload.formats.files import torch_zip
from torchload.formats.files.zip_directory import ZipDirectory

__all__ = ["open_directory"]

MAX_CODE_BYTES = 64 << 20  # of the source texts that are read, together; the largest known archives have a tenth
MAX_DEPTH = 200
MAX_TENSORS = 1_000_000
MAX_NAME_LENGTH = 4096  # characters of a dotted name

# The lines of a source text that matter, as torch prints them; names stand between quotes as they are.
_LINE = re.compile(
    r"^class (?P<begins>\w+)\(|^  __(?P<kind>parameters|buffers)__ = \[(?P<names>.*)\]$|(?P<ends>^  def )|"
    r'^  (?:(?P<plain>\w+) : |__annotations__\["(?P<quoted>[^"\n]+)"\] = )(?:Tensor|Optional\[Tensor\])$',
    re.MULTILINE,
)
_NAME = re.compile(r'"([^"]*)"')


@dataclass(slots=True)
class _ModuleClass:
    """What the source text of a scripted module says about its tensors; ``None`` where it has no such list."""

    parameters: frozenset[str] | None = None
    buffers: frozenset[str] | None = None
    tensors: set[str] = field(default_factory=set)

    def names(self) -> tuple[frozenset[str], frozenset[str]]:
        """The names of its parameters and of its buffers."""
        parameters = self.parameters or frozenset()
        # Before there was a list of buffers (torch 1.6), every tensor that is no parameter was one.
        buffers = self.buffers if self.buffers is not None else frozenset(self.tensors)
        return parameters, buffers - parameters


def open_directory(directory: ZipDirectory, path: str) -> Checkpoint:
    """Index a TorchScript archive without reading tensor data."""
    checkpoint = torch_zip.open_directory(directory, path)
    if not _is_scripted(checkpoint.root):
        raise CheckpointFormatError(
            f"{path} is a TorchScript archive without a module in it, so it has no state dict.",
            path=path,
            found="TorchScript archive",
        )
    root = _state_dict(checkpoint.root, _Code(directory, f"{directory.top}code/", path), path)
    return Checkpoint(path, "TorchScript archive", root, checkpoint.sources, checkpoint.checksums, checkpoint.notes)


def _state_dict(module: Record, code: _Code, path: str) -> Container:
    """Parameters, then buffers, then the children's, as torch orders them."""
    state = Container(origin=module.name)
    # (module, prefix, modules around it); the last first, so that children keep their order.
    pending: list[tuple[Record, str, tuple[int, ...]]] = [(module, "", ())]
    while pending:
        record, prefix, around = pending.pop()
        too_many = len(state) + len(pending) > MAX_TENSORS or len(prefix) > MAX_NAME_LENGTH
        if id(record) in around or len(around) > MAX_DEPTH or too_many:
            raise damaged(path, f"its module {prefix[:200]!r} contains itself, or too many are nested")
        # A module with a __getstate__ of its own (quantized ones) has another state; its tensors are packed.
        attributes = record.state if isinstance(record.state, dict) else {}
        _own_tensors(record, attributes, prefix, code, state)
        inside = (*around, id(record))
        children = [
            (value, f"{prefix}{name}.", inside)
            for name, value in attributes.items()
            if isinstance(value, Record) and _is_scripted(value)
        ]
        pending.extend(reversed(children))
    return state


def _own_tensors(record: Record, attributes: dict[str, object], prefix: str, code: _Code, state: Container) -> None:
    tensors = {name: value for name, value in attributes.items() if type(value) in (TensorEntry, OpaqueTensor)}
    if not tensors:
        return
    parameters, buffers = code.tensor_names(record.name)
    for wanted, is_parameter in ((parameters, True), (buffers, False)):
        for name, value in tensors.items():
            if name in wanted:
                if isinstance(value, TensorEntry):
                    value = TensorEntry(value.dtype, value.shape, value.boxes, is_parameter)
                state[prefix + name] = value


def _is_scripted(value: object) -> bool:
    return isinstance(value, Record) and value.name.startswith("__torch__.")


class _Code:
    """The source texts of an archive, read as far as somebody asks."""

    def __init__(self, directory: ZipDirectory, folder: str, path: str) -> None:
        self._directory = directory
        self._folder = folder
        self._path = path
        self._files: dict[str, dict[str, _ModuleClass]] = {}
        self._read_bytes = 0

    def tensor_names(self, qualified: str) -> tuple[frozenset[str], frozenset[str]]:
        """The names of the parameters and of the buffers of a class, such as ``__torch__.torch.nn.Linear``."""
        module, _, name = qualified.rpartition(".")
        file = f"{self._folder}{module.replace('.', '/')}.py"
        if file not in self._files:
            self._files[file] = self._classes(file)
        found = self._files[file].get(name)
        if found is None or found.parameters is None:
            problem = f"it holds a {qualified[:200]}, and its code doesn't say which of its tensors are parameters"
            raise damaged(self._path, problem)
        return found.names()

    def _classes(self, file: str) -> dict[str, _ModuleClass]:
        record = self._directory.records.get(file)
        if record is None:
            return {}
        self._read_bytes += record.size
        if self._read_bytes > MAX_CODE_BYTES:
            raise CheckpointFormatError(
                f"{self._path} has more than {MAX_CODE_BYTES >> 20} MiB of code, which is not read.", path=self._path
            )
        classes: dict[str, _ModuleClass] = {}
        current: _ModuleClass | None = None
        for line in _LINE.finditer(self._directory.read(file).decode("utf-8", "replace")):
            if line["begins"]:
                current = classes[line["begins"]] = _ModuleClass()
            elif line["ends"]:
                current = None  # a class's own lines stand before its first method
            elif current is None:
                continue
            elif line["kind"] == "parameters":
                current.parameters = frozenset(_NAME.findall(line["names"]))
            elif line["kind"] == "buffers":
                current.buffers = frozenset(_NAME.findall(line["names"]))
            else:
                current.tensors.add(line["plain"] or line["quoted"])
        return classes
