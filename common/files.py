"""Text files that appear complete or not at all; what `write` has written outlives a power cut."""

import os
import uuid
from contextlib import suppress
from pathlib import Path

from common.errors import UserError

SECRET = 0o600  # readable by its owner only
OPEN = 0o666  # what the user's umask leaves of it


def write(path: Path, text: str, mode: int = OPEN) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # Made with its final mode: a secret is at no moment readable by others.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): check its folder and disk") from None
    finally:
        with suppress(OSError):  # mostly there is none: it has its final name
            temporary.unlink()


def replace(path: Path, text: str) -> None:
    """The whole file or the one before, whenever the process is killed; for what is written often."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def sweep(folder: Path) -> None:
    """Remove what killed writers left behind. Only for a folder that nobody is writing to."""
    for leftover in folder.glob(f".*.{'[0-9a-f]' * 32}.tmp"):
        leftover.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """A new name is on the disk when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
