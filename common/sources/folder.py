"""A folder with one subfolder for every class; images lie anywhere below it.

DIR/CLASS/image.jpg, or DIR/train/CLASS/image.jpg with DIR/test/CLASS/image.jpg (or val) beside it: `train` means the
training set if nothing but train, test and val folders are there. Without a test folder `data.test_share` of every
class is put aside. Hidden files and files that are no images by their name are passed over.
"""

import os
from pathlib import Path
from typing import NoReturn

from common.config import DataConfig
from common.errors import UserError
from common.images import Split
from common.sources import files


def load(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
    return files.load(*listings(Path(config.path)), config, classes)


def listings(root: Path) -> tuple[files.Listing, files.Listing | None]:
    """What there is to train with and, where the folder has them, to test with."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder: name one with a subfolder of images for every class")
    sets = {entry.name for entry in _subfolders(root)}
    if "train" in sets and sets <= {"train", "test", "val"}:
        test = next((root / name for name in ("test", "val") if name in sets), None)
        return _list(root / "train"), None if test is None else _list(test)
    return _list(root), None


def _subfolders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list(root: Path) -> files.Listing:
    paths, names = [], []
    for folder in _subfolders(root):
        for path in find(folder):
            paths.append(path)
            names.append(folder.name)
    if not paths:
        raise UserError(f"{root}: no image in any subfolder: put images of class NAME into {root / 'NAME'}")
    return files.Listing(paths, names)


def find(root: str | Path) -> list[str]:
    """Every image file below `root`, in an order that does not depend on the file system."""

    def refuse(error: OSError) -> NoReturn:
        raise error  # os.walk would pass over a folder that may not be read

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        images = (name for name in names if Path(name).suffix.lower() in files.SUFFIXES)
        found += [str(Path(folder, name)) for name in sorted(images) if not name.startswith(".")]
    return found
