"""Named groups of tensors: what a part of a model is once it leaves its module.

Names are state-dict names, always taken in sorted order, so the flat form, the manifest and the digest of a
part depend on nothing but its names, shapes, dtypes and values: not on the order of a dictionary, on memory
layout or on the device. A file is complete or it is not there, and what is read back is bit for bit what was
saved: anything else raises `Corrupt`.
"""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import UserError
from common.files import sync

Tensors: TypeAlias = dict[str, Tensor]

BLOCK = 2**14  # bytes
TYPES = {  # as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Corrupt(UserError):
    """A file is cut short, damaged or not ours."""


def tensors(module: nn.Module, names: Collection[str] | None = None) -> Tensors:
    """The live parameters and floating-point buffers of a module, all of them or those named: no copies.

    Integer buffers (BatchNorm's `num_batches_tracked`) are left out, so they are neither averaged nor sent:
    they count one site's steps, their mean means nothing, and no layer with a momentum reads them.
    """
    state = module.state_dict(keep_vars=True)
    live = {name: t for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if names is None:
        return live
    unknown = sorted(set(names) - live.keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is not a floating-point tensor of the module")
    return {name: t for name, t in live.items() if name in names}


def prefixed(prefix: str, module: nn.Module) -> Tensors:
    """The tensors of a module under names of a larger one, as in the files of finished models."""
    return {f"{prefix}.{name}": t.detach() for name, t in tensors(module).items()}


def snapshot(t: Tensors) -> Tensors:
    """Copies, detached, each on the device of the original."""
    return {name: value.detach().clone() for name, value in t.items()}


@torch.no_grad()
def load(live: Tensors, values: Tensors) -> None:
    """Copy values into live tensors in place. Nothing is written unless all names and shapes are the same."""
    for name in sorted(live.keys() | values.keys()):
        if name not in values:
            raise ValueError(f"{name} is missing")
        if name not in live:
            raise ValueError(f"{name} is not expected")
        ours, theirs = tuple(live[name].shape), tuple(values[name].shape)
        if ours != theirs:
            raise ValueError(f"{name} has shape {theirs} instead of {ours}")
    torch._foreach_copy_([live[name] for name in values], list(values.values()))


@dataclass(frozen=True)
class Manifest:
    """Names, shapes and dtypes of a part in sorted order: what turns one flat tensor back into the part."""

    entries: tuple[tuple[str, tuple[int, ...], str], ...]  # (name, shape, dtype such as float32)

    @classmethod
    def of(cls, tensors: Tensors) -> "Manifest":
        return cls(tuple((name, tuple(t.shape), _dtype(t)) for name, t in sorted(tensors.items())))

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self.entries)

    def as_json(self) -> str:
        return json.dumps(self.entries, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `as_json` wrote. It comes from the network: anything else raises ValueError."""
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("the manifest is not valid JSON") from None
        if not isinstance(listed, list):
            raise ValueError("the manifest is not a list")
        entries = tuple(_entry(value) for value in listed)
        if any(entry[0] >= after[0] for entry, after in pairwise(entries)):
            raise ValueError("the names of the manifest are not different and in order")
        return cls(entries)


def flatten(tensors: Tensors) -> Tensor:
    """All values as one new 1-D tensor, in the order of the manifest. Tensors of mixed dtypes are refused."""
    dtypes = sorted({_dtype(t) for t in tensors.values()})
    if len(dtypes) > 1:
        raise ValueError(f"tensors of different dtypes ({', '.join(dtypes)}) have no flat form")
    if not tensors:
        return torch.empty(0)
    return torch.cat([t.detach().reshape(-1) for _, t in sorted(tensors.items())])


def unflatten(flat: Tensor, manifest: Manifest) -> Tensors:
    """The part a flat tensor holds, as views into it."""
    if flat.shape != (manifest.numel,):
        raise ValueError(f"the flat tensor has shape {tuple(flat.shape)} instead of ({manifest.numel},)")
    for name, _, dtype in manifest.entries:
        if dtype != _dtype(flat):
            raise ValueError(f"{name} is {dtype} in the manifest but the flat tensor is {_dtype(flat)}")
    pieces = torch.split(flat, [math.prod(shape) for _, shape, _ in manifest.entries])
    return {name: piece.view(shape) for (name, shape, _), piece in zip(manifest.entries, pieces, strict=True)}


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, shapes, dtypes and little-endian bytes."""
    total = hashlib.sha256(Manifest.of(tensors).as_json().encode())
    for _, t in sorted(tensors.items()):
        total.update(_memory(t))
    return total.hexdigest()


def label(tensors: Tensors) -> str:
    """A name for tensors of our own making. It tells apart any two that nobody has made to have the same, as a digest
    does, in a tenth of the time."""
    total = hashlib.sha256(Manifest.of(tensors).as_json().encode())
    for _, t in sorted(tensors.items()):
        sums, rest = block_sums(_memory(t))
        total.update(sums)
        total.update(rest)
    return total.hexdigest()


def block_sums(data: bytes | memoryview) -> tuple[memoryview, memoryview]:
    """The sums of all blocks, as 64-bit words, and what is left behind the last. They miss nothing but words that
    change places within a block."""
    view = memoryview(data)
    whole = len(view) // BLOCK * BLOCK
    words = np.frombuffer(view[:whole], np.uint64) if whole else np.empty(0, np.uint64)
    return words.reshape(-1, BLOCK // 8).sum(axis=1).view(np.uint8).data, view[whole:]


def save(path: Path, tensors: Tensors, metadata: dict[str, str], durable: bool = True) -> None:
    """Write a safetensors file that appears under its name complete or not at all.

    `durable` returns only when the file and its name are on the disk and outlive a power cut. The metadata
    keys `digest` (of the tensors) and `seal` (of all metadata) are the file's own. A writer that is killed
    leaves its temporary file behind: see `files.sweep`.
    """
    taken = metadata.keys() & {"digest", "seal"}
    if taken:
        raise ValueError(f"the metadata key {min(taken)} is the file's own")
    metadata = {**metadata, "digest": digest(tensors)}
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that all are aligned
    head = _head([(name, tensors[name]) for name in names], {**metadata, "seal": _seal(metadata)})
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # Not safetensors' own writers: they copy all tensors, twice, before the first byte is written.
        with temporary.open("xb") as file:
            file.write(head)
            for name in names:
                file.write(_memory(tensors[name]))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({_reason(error)}): check its folder and disk") from None
    finally:
        with suppress(OSError):  # mostly there is none: it has its final name
            temporary.unlink()


def read(path: Path, sealed: bool = True) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata as they were saved; with `sealed=False` also a file that other software wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # Copies, because a tensor mapped from a file changes or dies with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}): name a safetensors file") from None
    except SafetensorError as error:
        raise Corrupt(f"{path}: is damaged or not a safetensors file ({_reason(error)})") from None
    if not sealed:
        return tensors, metadata
    seal = metadata.pop("seal", None)
    if seal != _seal(metadata) or metadata.pop("digest", None) != digest(tensors):
        raise Corrupt(f"{path}: is damaged: its content does not match its own digest")
    return tensors, metadata


def _memory(t: Tensor) -> memoryview:
    """The values, row by row; where they lie so already, no copy."""
    # As uint8, because numpy knows no bfloat16. The machines this runs on are little-endian themselves.
    view: memoryview = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def _head(entries: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with."""
    about: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, t in entries:
        begin, end = end, end + t.numel() * t.dtype.itemsize
        about[name] = {"dtype": TYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(value: object) -> tuple[str, tuple[int, ...], str]:
    match value:
        case [str() as name, list() as shape, str() as dtype]:
            lengths = all(type(length) is int and length >= 0 for length in shape)
            if lengths and str(vars(torch).get(dtype)) == f"torch.{dtype}":
                return name, tuple(shape), dtype
    raise ValueError("an entry of the manifest is not [name, shape, dtype]")


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _seal(metadata: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
