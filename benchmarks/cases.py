"""What is measured: which model, from which file, into what."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FORMATS", "Case", "list_cases"]

MIB = 1 << 20
FORMATS = ("pth", "safetensors")


@dataclass(frozen=True, slots=True)
class Case:
    """One experiment: every arm that can, does exactly this.

    Attributes:
        name: ``family/what/format``; what ``--cases`` selects by.
        model: Name in `models.MODELS`.
        amount: How large: bytes of float32 for a transformer, tensors for layers, nothing for a fixed model.
        into: ``"existing"``: parameters that are in memory and keep their storage; ``"meta"``: a model without storage.
        file_format: ``"pth"`` (zip) or ``"safetensors"``.
        file_dtype, model_dtype: Names of torch dtypes; a cast on the way where they differ.
        cold: Whether the file is dropped from the page cache before every sample.
        ceilings: Whether memory and device ceilings say anything here (not where the cost is per tensor).
        few_peers: Whether only torch and safetensors run beside torchload: the fastest, in every case so far.
        series: ``"tensors"`` or ``"bytes"``: the chart of cost against size that this case is a point of.
    """

    name: str
    model: str
    amount: int = 0
    into: str = "existing"
    file_format: str = "pth"
    file_dtype: str = "float32"
    model_dtype: str = "float32"
    cold: bool = False
    ceilings: bool = False
    few_peers: bool = False
    series: str | None = None


def list_cases(size_bytes: int, *, cold: bool = False, quick: bool = False, full: bool = False) -> list[Case]:
    """All cases of a run, in the order in which they are measured.

    Args:
        size_bytes: Size of the big model in float32.
        cold: The cold-cache cases instead of the warm ones.
        quick: Only the most telling ones, and smaller.
        full: Also the ones that take long.

    Example:
        >>> [case.name for case in list_cases(1 << 20, cold=True, quick=True)]
        ['cold/existing/pth', 'cold/existing/safetensors']
    """
    if cold:
        targets = [("existing", "float32")] if quick else [("existing", "float32"), ("meta", "float32")]
        return _big("cold", size_bytes, targets, cold=True)
    cases = _big("big", size_bytes, [("existing", "float32"), ("existing", "float16"), ("meta", "float32")])
    tensors = 4_000 if quick else 20_000
    cases += [Case(f"many/flat/{kind}", "layers", tensors, file_format=kind) for kind in FORMATS]
    if not quick:
        cases += [Case(f"many/tree/{kind}", "layer-tree", tensors, file_format=kind) for kind in FORMATS]
    cases += [Case(f"resnet/existing/{kind}", "resnet18", file_format=kind) for kind in FORMATS]
    cases += [Case(f"tiny/existing/{kind}", "tiny", file_format=kind) for kind in FORMATS]
    if quick:
        return cases
    for source, target in (("float32", "bfloat16"), ("float16", "float32"), ("float64", "float32")):
        amount = size_bytes * _BYTES["float32"] // max(_BYTES[source], _BYTES["float32"])
        for kind in FORMATS:
            name = f"cast/{source}-{target}/{kind}"
            cases.append(
                Case(name, "transformer", amount, "existing", kind, source, target, ceilings=True, few_peers=True)
            )
    counts = [500, 2_000, 8_000, 32_000, *([200_000] if full else [])]
    sizes = [size for size in (2 * MIB, 16 * MIB, 128 * MIB, 1024 * MIB) if size <= size_bytes]
    series = [("tensors", f"{count}", "layers", count) for count in counts]
    series += [("bytes", f"{size // MIB}MiB", "transformer", size) for size in sizes]
    for kind in FORMATS:
        for what, label, model, amount in series:
            name = f"{what}/{label}/{kind}"
            cases.append(Case(name, model, amount, file_format=kind, few_peers=True, series=what))
    return cases


_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def _big(family: str, size_bytes: int, targets: list[tuple[str, str]], *, cold: bool = False) -> list[Case]:
    cases = []
    for into, dtype in targets:
        what = into if dtype == "float32" else dtype
        for kind in FORMATS:
            name = f"{family}/{what}/{kind}"
            cases.append(Case(name, "transformer", size_bytes, into, kind, model_dtype=dtype, cold=cold, ceilings=True))
    return cases
