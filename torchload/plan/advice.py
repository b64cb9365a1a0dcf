"""The arguments that would make a file fit: found by comparing what is missing with what is left, then tried."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from torchload.core.checkpoint import Shape
from torchload.core.text import as_glob
from torchload.errors import advised
from torchload.match import Selection
from torchload.match.paths import last
from torchload.model.target import Target

__all__ = ["Advice", "likeness"]

_MOST_GLOBS = 4
_MOST_RULES = 6
_MOST_NAMES = 5_000

Rules = dict[str, str]
"""A `rename` mapping: regular expression → replacement."""


class Advice:
    """What to propose to somebody whose file does not fit."""

    def __init__(self, target: Target, selection: Selection) -> None:
        self._target = target
        self._selection = selection
        self._lacking = [*selection.mismatched, *selection.missing]
        self._surplus = [selection.alignment.leftover.get(name, name) for name in selection.unexpected]

    def lines(self) -> list[str]:
        """The proposals, each of which makes the file fit."""
        if not (self._lacking or self._surplus):
            return []
        lines = []
        if self.renaming:
            rules = ", ".join(f"{_literal(pattern)}: {_literal(new)}" for pattern, new in self.renaming.items())
            lines.append(f"  If that is the same part under another name: {advised(f'rename={{{rules}}}')}")
        fitting = [name for name in self._selection.pairs if name not in self._selection.mismatched]
        globs = _globs([*self._lacking, *self._surplus], fitting)
        if len(globs) <= _MOST_GLOBS and len(self._lacking) <= len(fitting) and self._fits(skip=globs):
            what = "For a part that is meant to be new" if self._lacking else "To leave these out"
            if any(slot.tensor.is_meta for name in self._lacking if (slot := self._target.by_name.get(name))):
                what += ": build it on a real device, not on meta, and then"
            lines.append(f"  {what}: {advised(f'skip={[*self._selection.globs, *globs]}')}")
        return lines

    @cached_property
    def renaming(self) -> Rules | None:
        """The `rename` that mends it, if one does."""
        selection = self._selection
        leftovers = [*selection.unexpected, *selection.outside]
        if selection.original or not selection.missing or not leftovers:
            return None
        if max(len(leftovers), len(selection.missing)) > _MOST_NAMES:
            return None
        in_file = {selection.alignment.leftover.get(name, name): _shape(selection, name) for name in leftovers}
        in_model = {name: slot.shape for name in selection.missing if (slot := self._target.by_name.get(name))}
        for rules in _proposals(in_file, in_model):
            if 0 < len(rules) <= _MOST_RULES and self._fits(rename=rules):
                return rules
        return None

    @cached_property
    def renamed(self) -> Mapping[str, str]:
        """Model name → what the file calls it, of what the renaming mends."""
        if not self.renaming:
            return {}
        found = {}
        for name in (*self._selection.unexpected, *self._selection.outside):
            new = name
            for pattern, replacement in self.renaming.items():
                new = re.sub(pattern, replacement, new)
            found[self._selection.alignment.leftover.get(new, new)] = name
        return found

    def _fits(self, *, skip: Sequence[str] = (), rename: Rules | None = None) -> bool:
        attempt = self._selection.attempt
        return attempt is not None and attempt(skip, rename)


def _shape(selection: Selection, name: str) -> Shape | None:
    return getattr(selection.leaves.get(name), "shape", None)


# --- renaming ---


def _literal(text: str) -> str:
    """A string as one writes it, raw where it has backslashes."""
    return f"r'{text}'" if "\\" in text and "'" not in text and not text.endswith("\\") else repr(text)


def _proposals(in_file: Mapping[str, Shape | None], in_model: Mapping[str, Shape | None]) -> Iterator[Rules]:
    """Tables that might turn the names of the file into those of the model, the simplest first."""
    if rules := _by_contents(in_file, in_model):
        for table in (_with_numbers(rules), rules):
            yield table
            yield {pattern.replace("^", r"\b", 1): new for pattern, new in table.items()}  # below a prefix
    yield from _by_another_way_to_number(in_file, in_model)
    yield from _by_a_level(in_file, in_model)


def _by_contents(in_file: Mapping[str, Shape | None], in_model: Mapping[str, Shape | None]) -> Rules:
    """Modules of one place with the same contents, by names and shapes: `classifier` is `fc`."""
    rules: Rules = {}
    todo = [("", "", dict(in_file), dict(in_model))]
    while todo:
        here, there, left, right = todo.pop()
        parts, wanted = _children(left), _children(right)
        both = parts.keys() & wanted.keys()
        todo += [(f"{here}{label}.", f"{there}{label}.", parts[label], wanted[label]) for label in both]
        extra = {label: frozenset(parts[label].items()) for label in parts.keys() - wanted.keys()}
        lacking = {label: frozenset(wanted[label].items()) for label in wanted.keys() - parts.keys()}
        by_contents: dict[frozenset[tuple[str, Shape | None]], list[str]] = {}
        for new, contents in lacking.items():
            by_contents.setdefault(contents, []).append(new)
        times = Counter(extra.values())
        for old, contents in extra.items():
            alike = by_contents.get(contents, [])
            if times[contents] > 1:
                alike = [new for new in alike if _numbers(new) == _numbers(old) and _numbers(old)]
            if len(alike) == 1:
                end = "$" if contents == frozenset({("", next(iter(parts[old].values())))}) else r"\."
                dot = "" if end == "$" else "."
                rules[f"^{re.escape(here + old)}{end}"] = f"{there}{alike[0]}{dot}"
    return rules


def _children(names: Mapping[str, Shape | None]) -> dict[str, dict[str, Shape | None]]:
    children: dict[str, dict[str, Shape | None]] = {}
    for name, shape in names.items():
        label, _, rest = name.partition(".")
        if label:
            children.setdefault(label, {})[rest] = shape
    return children


def _numbers(label: str) -> list[str]:
    return re.findall(r"\d+", label)


def _with_numbers(rules: Rules) -> Rules:
    r"""Rules that differ in a number alone, as one: ``^stage(\d+)\.`` → ``layer\1.``."""
    joined: Rules = {}
    for pattern, new in rules.items():
        old_numbers, new_numbers = _numbers(pattern), _numbers(new)
        if len(old_numbers) == 1 and old_numbers == new_numbers:
            pattern = pattern.replace(old_numbers[0], r"(\d+)")
            new = new.replace(new_numbers[0], r"\1")
        joined[pattern] = new
    return joined if len(joined) < len(rules) else rules


def _by_another_way_to_number(in_file: Mapping[str, object], in_model: Mapping[str, object]) -> Iterator[Rules]:
    """`stages.0` is `stages_0` or `stages0`, and the other way round."""
    for separator in ("_", ""):
        joined = re.compile(rf"([A-Za-z]\w*?){separator}(\d+)\.")
        dotted = re.compile(r"([A-Za-z]\w*?)\.(\d+)\.")
        for pattern, new in ((joined, r"\1.\2."), (dotted, rf"\1{separator}\2.")):
            stems = {found[1] for name in in_file if (found := pattern.match(name))}
            if len(stems) == 1 and {pattern.sub(new, name, count=1) for name in in_file} >= in_model.keys():
                stem = re.escape(next(iter(stems)))
                between = separator if pattern is joined else r"\."
                yield {rf"^({stem}){between}(\d+)\.": new}


def _by_a_level(in_file: Mapping[str, object], in_model: Mapping[str, object]) -> Iterator[Rules]:
    """One side has a level of modules that the other lacks: `text.transformer` is `transformer`, or an adapter's."""
    for inner, outer, adds in ((in_file, in_model, True), (in_model, in_file, False)):
        below_label: dict[str, set[str]] = {}
        for name in outer:
            label, dot, rest = name.partition(".")
            if dot:
                below_label.setdefault(label, set()).add(rest)
        for label, below in below_label.items():
            if below <= inner.keys():
                tops = sorted({name.partition(".")[0] for name in below})
                if adds:
                    yield {rf"^({'|'.join(map(re.escape, tops))})(?=\.|$)": rf"{label}.\1"}
                else:
                    yield {rf"^{re.escape(label)}\.": ""}
        marked = [name for name in outer if ".base_layer." in name]
        if marked and {name.replace(".base_layer.", ".") for name in marked} <= inner.keys():
            if adds:
                stems = sorted({name.partition(".base_layer.")[0].rpartition(".")[2] for name in marked})
                yield {rf"\b({'|'.join(map(re.escape, stems))})\.(?=[^.]+$)": r"\1.base_layer."}
            else:
                yield {r"\.base_layer\.": "."}


# --- skipping ---


def _globs(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Globs that match all of `names` and none of `others`, as few as a look at the paths gives."""
    others = list(others)
    taken = {name[:end] for name in others for end in _ends(name)}
    leaves = {last(name) for name in others}
    globs: dict[str, None] = {}
    for name in names:
        free = next((name[:end] for end in _ends(name) if name[:end] not in taken), name)
        leaf = last(name)
        if free != name:
            globs[f"{as_glob(free)}.*"] = None
        elif leaf not in leaves and "." in name:
            globs[f"*.{as_glob(leaf)}"] = None
        else:
            globs[as_glob(name)] = None
    return list(globs)


def _ends(name: str) -> list[int]:
    """Where the paths end that lead to a name: at each dot, and at its own end."""
    return [*(position for position, character in enumerate(name) if character == "."), len(name)]


# --- what no argument mends ---

_FUSED = (
    (
        r"\b(qkv|qkv_proj|in_proj_weight|in_proj_bias|c_attn|query_key_value|to_qkv)\b",
        r"\b(q_proj|k_proj|v_proj|to_q|to_k|to_v|q|k|v|query|key|value)\b",
    ),
    (r"\b(gate_up_proj|w13|w1_w3)\b", r"\b(gate_proj|up_proj|w1|w3)\b"),
)
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_STACKED = re.compile(r"\bexperts\.[A-Za-z_]\w*$|\bexperts\.[A-Za-z_]\w*\.(weight|bias)$")


def likeness(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """Sentences about known ways to keep the same weights in other tensors, which no renaming mends.

    Example:
        >>> likeness(["h.qkv.weight"], ["h.q_proj.weight", "h.k_proj.weight"])[0]
        'The file has h.q_proj.weight, split; the model has h.qkv.weight, fused. Concatenate them first.'
    """
    sentences = []
    for fused, split in _FUSED:
        if (file := _first(split, unexpected)) and (model := _first(fused, missing)):
            sentences.append(f"The file has {file}, split; the model has {model}, fused. Concatenate them first.")
        if (file := _first(fused, unexpected)) and (model := _first(split, missing)):
            sentences.append(f"The file has {file}, fused; the model has {model}, split. Split it first.")
    if (file := _first(_EXPERT, unexpected)) and (model := _first(_STACKED, missing)):
        sentences.append(
            f"The file has experts one by one ({file}), the model has them stacked ({model}). Stack them first."
        )
    if (file := _first(_STACKED, unexpected)) and (model := _first(_EXPERT, missing)):
        sentences.append(f"The file has experts stacked ({file}), the model one by one ({model}). Split them first.")
    for side, whose in ((missing, "model"), (unexpected, "file")):
        if adapter := _first(r"\.base_layer\.", side):
            sentences.append(
                f"The {whose} has adapters around its layers ({adapter}): load before they are added, or merge them."
            )
    return sentences


def _first(pattern: str | re.Pattern[str], names: Sequence[str]) -> str | None:
    return next(filter(re.compile(pattern).search, names), None)
