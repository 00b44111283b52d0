"""Disks of a test's own: a small one that gets full, and one that nobody may write to, also not root.

They are mounted in a mount namespace of this process and of those it starts from then on, so nobody else sees them, and
the kernel takes them away with the last of these processes, however they end.
"""

import ctypes
import errno
import os
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

CLONE_NEWNS = 0x20000
BLOCK = 1 << 20


@cache
def why_not() -> str:
    """Why there can be none here; empty where there can. The first call enters the namespace."""
    if os.geteuid() != 0:
        return "mounting needs root"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        return f"no mount namespace is to be had ({os.strerror(ctypes.get_errno())})"
    for words in (("--make-rslave", "/"), ("-t", "tmpfs", "tmpfs", "/dev/shm")):  # of the latter see clocks.py
        if failed := _mount(*words):
            return failed
    return ""


def mounted(under: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return [place for place in (line.split()[1] for line in lines) if place.startswith(f"{under}/")]


class SmallDisk:
    """A disk of its own for a folder, which need not be there yet. Use it as a context; what is on it stays."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self._size = size
        self._ballast = folder / "ballast"

    def __enter__(self) -> "SmallDisk":
        self.folder.mkdir(parents=True, exist_ok=True)
        _must("-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        """The processes that used it have ended."""
        self.free()
        kept = self.folder.with_name(f"{self.folder.name}.kept")
        subprocess.run(["cp", "-a", self.folder, kept], check=True)
        subprocess.run(["umount", self.folder], check=True)
        self.folder.rmdir()
        kept.rename(self.folder)

    def fill(self) -> None:
        """To the last byte. What is freed meanwhile can be filled again."""
        with self._ballast.open("ab", buffering=0) as file:
            size = BLOCK
            while size:
                try:
                    file.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2

    def free(self) -> None:
        with suppress(FileNotFoundError):
            self._ballast.unlink()


class ReadOnly:
    """A folder to which nobody can write for as long as the context lasts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        _must("--bind", self._folder, self._folder)
        _must("-o", "remount,bind,ro", self._folder)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self._folder], check=True)


def _must(*words: object) -> None:
    assert not why_not(), why_not()
    if failed := _mount(*words):
        raise OSError(failed)


def _mount(*words: object) -> str:
    """Empty if it worked."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    return " ".join(done.stderr.split()) or "mount failed" if done.returncode else ""
