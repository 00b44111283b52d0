"""One part of a model as bytes that can be sent, and back, before any library of the network.

The bytes are nothing but the values, little-endian, in the order of the part's manifest: no format whose reader could
be led astray. They come back bit for bit, or, if the part was packed to be rounded, as float32 values rounded to
bfloat16. A checksum over manifest and bytes notices accidents; it is no defence against a liar, and needs to be
none, as a liar would compute it.

`Packed.part` may be handed anything: what is not as it should be raises ValueError with one printable line, before
anything is allocated that is larger than what came (twice that for rounded values).
"""

import math
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.parts import Manifest, Tensors, block_sums, digest, unflatten

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
# Nothing honest comes near these:
LINE = 200  # characters of a name
SHORT = 32  # characters of the digest of a fixed part
MANIFEST = 2**17  # characters
DIMENSIONS = 8
ELEMENTS = 2**48

with warnings.catch_warnings():  # torch warns once that bytes cannot be written to: nobody here does
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True)
class Packed:
    manifest: str
    dtype: str  # of the values in `data`
    count: int
    data: bytes
    checksum: str

    @classmethod
    def of(cls, part: Tensors, *, rounded: bool = False) -> "Packed":
        """Tensors of one floating-point dtype, wherever they are. `rounded` makes bfloat16 of float32."""
        dtypes = {t.dtype for t in part.values()} or {torch.float32}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES.values()):
            raise ValueError(f"only tensors of one floating-point dtype can be sent, not {sorted(map(str, dtypes))}")
        (dtype,) = dtypes
        if rounded and dtype is torch.float32:
            dtype = torch.bfloat16
        # One pass: values go from where they are straight into the bytes that are sent.
        data = b"".join(_memory(t.detach().to(dtype)) for _, t in sorted(part.items()) if t.numel())
        manifest = Manifest.of(part).as_json()
        name = str(dtype).removeprefix("torch.")
        return cls(manifest, name, len(data) // dtype.itemsize, data, _checksum(manifest, data))

    def part(self, *, rounded: bool = False) -> Tensors:
        """The tensors: views of `data` unless they were rounded. Read them, copy from them, never write to them.

        `rounded` allows float32 tensors to have come as bfloat16; it does not demand it.
        """
        if len(self.manifest) > MANIFEST:
            raise ValueError(f"its manifest is longer than {MANIFEST} characters")
        manifest = Manifest.from_json(self.manifest)
        for name, shape, _ in manifest.entries:
            check_name(name)
            # before anything is computed from it: a shape can name any number in any number of dimensions
            if len(shape) > DIMENSIONS or math.prod(max(length, 1) for length in shape) > ELEMENTS:
                raise ValueError(f"the shape of {name} is too large")
        dtypes = {dtype for _, _, dtype in manifest.entries} or {"float32"}
        if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
            raise ValueError("its tensors are not of one floating-point dtype")
        (dtype,) = dtypes
        sent = "bfloat16" if rounded and (dtype, self.dtype) == ("float32", "bfloat16") else dtype
        count = manifest.numel
        size = count * DTYPES[sent].itemsize
        if (self.dtype, self.count, len(self.data)) != (sent, count, size):
            raise ValueError(f"it is not the {count} values of {sent} that its manifest says")
        if _checksum(self.manifest, self.data) != self.checksum:
            raise ValueError("its values do not match their checksum")
        if not count:  # an empty buffer is none to torch
            return unflatten(torch.empty(0, dtype=DTYPES[dtype]), manifest)
        flat = torch.frombuffer(self.data, dtype=DTYPES[sent])
        if sent != dtype:
            # in numpy's memory, because it comes in large pages: several times faster than flat.float()
            flat = torch.from_numpy(np.empty(count, np.float32)).copy_(flat)
        return unflatten(flat, manifest)


def part_digest(part: str, group: Tensors) -> str:
    return digest({f"{part}/{name}": t for name, t in group.items()})[:SHORT]


def fixed_digest(fixed: Mapping[str, Tensors]) -> str:
    """The digests of all fixed parts in order, apart by blanks; empty for none."""
    return " ".join(sorted(part_digest(part, group) for part, group in fixed.items()))


def check_name(text: str) -> None:
    """ValueError unless it is short and does nothing to a terminal: names end up in logs and messages."""
    if len(text) > LINE or not text.isprintable():
        raise ValueError(f"the name {shown(text)} is longer than {LINE} characters or not printable")


def shown(text: str) -> str:
    """As much of what somebody sent as goes into a message."""
    return ascii(text[:40])


def _memory(t: Tensor) -> memoryview:
    # As uint8, because numpy knows no bfloat16. The machines this runs on are little-endian themselves.
    return t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(manifest: str, data: bytes) -> str:
    """CRC-32 of the manifest, of the sums of all blocks, and of what is left: a fifth of the time that one of all bytes
    would take, and what it misses, neither memory nor a network does."""
    sums, rest = block_sums(data)
    return f"{zlib.crc32(rest, zlib.crc32(sums, zlib.crc32(manifest.encode()))):08x}"
