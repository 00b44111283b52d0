"""Turn lossless image packs into the files the data sources read: `python -m benchmarks.unpack PACKS OUT`.

A pack is an .npz (no pickled objects) whose `webp` bytes are lossless WebP strips, images stacked vertically in order;
`offs` are the byte offsets of the strips, `hw` the height and width of one image, `labels` the classes. Packs of
original CIFAR-10 files also carry everything in those files that is not pixels: `pk_frame` (xz) holds head and tail
of each file one after the other, `pk_cut` their lengths, `pk_md5` the digest of each file.

Written, all in the original order, for the sources `cifar10` and `npz`:
  OUT/cifar-10-batches-py        bit for bit: a file whose md5 does not match is never left behind
  OUT/cifar100_lt50_train.npz    the long-tailed sets of IF .02 and .01 as they are (use them with imbalance = 1),
  OUT/cifar100_lt100_train.npz   with the reference's normalisation; cifar100_test.npz is the full test set;
  OUT/cifar10_lt50_train.npz...  the same of CIFAR-10, from the packs that benchmarks.pack makes
  OUT/gtsrb_train.npz            groups: the track, one physical sign, hence of one class; and gtsrb_test.npz
Files that exist are kept; a pack that is missing is passed over.
"""

import argparse
import hashlib
import io
import itertools
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import UserError
from common.sources.cifar import MOMENTS

Pack = dict[str, NDArray[np.generic]]
CIFAR10 = "cifar-10-batches-py"


def read(path: Path) -> Pack:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a readable pack ({error}): copy it again") from None


def strips(pack: Pack) -> Iterator[NDArray[np.uint8]]:
    """The images of the pack, strip by strip, as uint8 (n, h, w, 3): memory does not grow with the pack."""
    data = memoryview(pack["webp"].tobytes())
    height, width = pack["hw"].tolist()
    for start, end in itertools.pairwise(pack["offs"].tolist()):
        with Image.open(io.BytesIO(data[start:end])) as image:
            yield np.asarray(image.convert("RGB")).reshape(-1, height, width, 3)


def write(path: Path, data: bytes) -> None:
    """All of the file or none of it, so that an existing output is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    partial.replace(path)


def restore_cifar10(pack: Pack, folder: Path) -> None:
    """The original batch files: head, pixels as channel planes, tail."""
    names, digests = pack["pk_files"].tolist(), pack["pk_md5"].tolist()
    frame, cuts = io.BytesIO(lzma.decompress(pack["pk_frame"].tobytes())), pack["pk_cut"].tolist()
    images = (image for strip in strips(pack) for image in strip)
    share = len(pack["labels"]) // len(names)
    for name, digest, (head, tail) in zip(names, digests, cuts, strict=True):
        start, end = frame.read(head), frame.read(tail)
        planes = np.stack([next(images) for _ in range(share)]).transpose(0, 3, 1, 2)
        data = start + planes.tobytes() + end
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != digest:
            raise UserError(f"{folder / name}: restored with another md5 than the original: copy the pack again")
        write(folder / Path(name).name, data)
    write(folder / Path(str(pack["meta_name"])).name, pack["meta"].tobytes())


def save(path: Path, **arrays: NDArray[np.generic]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write(path, buffer.getvalue())


def unpack(packs: Path, out: Path) -> Iterator[tuple[str, str]]:
    """Write what is missing; yields every output's name and what was done about it."""

    def due(pack: str, *outputs: str) -> tuple[bool, str]:
        if all((out / name).exists() for name in outputs):
            return False, "kept"
        return (True, "written") if (packs / pack).is_file() else (False, f"no {pack} in {packs}")

    for pack, last in (("cifar10_train.npz", "data_batch_5"), ("cifar10_test.npz", "test_batch")):
        go, done = due(pack, f"{CIFAR10}/{last}", f"{CIFAR10}/batches.meta")
        if go:
            restore_cifar10(read(packs / pack), out / CIFAR10)
        yield f"{CIFAR10}/{last}", done

    for kind in ("cifar100", "cifar10"):
        names = (f"{kind}_lt50_train.npz", f"{kind}_lt100_train.npz")
        go, done = due(f"{kind}_lt_train.npz", *names)
        if go:
            arrays = read(packs / f"{kind}_lt_train.npz")
            images, labels = np.concatenate(list(strips(arrays))), arrays["labels"]
            rows = arrays["in_if100"].astype(bool)
            about = dict(zip(("mean", "std"), map(np.array, MOMENTS[kind]), strict=True))
            about |= {key: arrays[key] for key in ("classes",) if key in arrays}
            save(out / names[0], images=images, labels=labels, **about)
            save(out / names[1], images=images[rows], labels=labels[rows], **about)
        yield from ((name, done) for name in names)

    plain = {"cifar100_test.npz": "cifar100_test.npz", "cifar10_lt_test.npz": "cifar10_test.npz",
             "gtsrb32_train.npz": "gtsrb_train.npz", "gtsrb32_test.npz": "gtsrb_test.npz"}  # fmt: skip
    for pack, name in plain.items():
        go, done = due(pack, name)
        if go:
            arrays = read(packs / pack)
            kept = {"images": np.concatenate(list(strips(arrays))), "labels": arrays["labels"]}
            kept |= {key: arrays[key] for key in ("classes",) if key in arrays}
            if "track" in arrays:  # tracks are numbered anew in every class
                pairs = zip(arrays["labels"].tolist(), arrays["track"].tolist(), strict=True)
                kept["groups"] = np.array([f"{label:02d}-{track:05d}" for label, track in pairs])
            save(out / name, **kept)
        yield name, done


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unpack", description=__doc__.splitlines()[0])
    parser.add_argument("packs", type=Path, help="folder with the packs")
    parser.add_argument("out", type=Path, help="folder to write to")
    given = parser.parse_args()
    try:
        for name, done in unpack(given.packs, given.out):
            print(f"{name}: {done}", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
