"""A site's private images, and which of them it judges by: fixed at the first start and recorded in splits.json.

A test set that comes with the data (a folder with train and test, the split column of a table, a second file) is used
as it is. Otherwise 20 % of every class are put aside, never the last image a class can be trained with, drawn once
from the site's name. Images are recorded by what they are (path or digest of pixels), so those that are added later
go to training, those that went are dropped, also for as long as they are away, and an image that was once drawn for
testing is never trained on. Training images keep the order of the data.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import files
from common.errors import UserError
from common.holding import Holding, gather
from common.partition import counts, holdout

TEST_SHARE = 0.2
OWN, DRAWN = "own", "drawn"  # where the test images come from


@dataclass(frozen=True)
class SiteData:
    train: Holding
    test: Holding
    counts: Tensor  # training images of every class
    notes: tuple[str, ...]  # what the owner of the data should know


@dataclass(frozen=True)
class _Record:
    made: str
    train: tuple[str, ...]
    test: tuple[str, ...]

    def write(self, path: Path) -> None:
        files.write(path, json.dumps({"made": self.made, "train": self.train, "test": self.test}, indent=0))


def load(
    path: Path, test: Path | None, classes: tuple[str, ...], name: str, record: Path, anew: str = "--state"
) -> SiteData:
    """The images at `path` of the site `name`, divided as `record` says, which is written when there is none; `anew` is
    the option by which there is another record."""
    everything, own = gather(path, classes, test)
    before = _read(record, anew)
    _same_kind(before, own, record, anew)
    notes: list[str] = []
    if own is None:
        drawn = before.test if before else _draw(everything.names, everything.labels, name)
        train, judged = _divide(everything, set(drawn))
        if not len(train.labels):
            raise UserError(f"{path}: every image here is a test image by {record}: add images to train with")
        now = _Record(DRAWN, tuple(train.names), drawn)
    else:
        train, judged = everything, own
        now = _Record(OWN, tuple(train.names), tuple(judged.names))
        notes += _warnings(now, before)
    if now != before:
        notes += _changes(before, now, judged) if before else []
        now.write(record)
    if not len(judged.labels):
        notes.append("no image to judge by: this site says nothing of how good the models are")
    return SiteData(train, judged, counts(train.labels, torch.arange(len(train.labels)), len(classes)), tuple(notes))


def _divide(everything: Holding, drawn: set[str]) -> tuple[Holding, Holding]:
    held = torch.tensor([name in drawn for name in everything.names])
    return everything.take(torch.nonzero(~held).flatten()), everything.take(torch.nonzero(held).flatten())


def _draw(names: Sequence[str], labels: Tensor, site: str) -> tuple[str, ...]:
    """Names of the test images. Copies of an image share its name and so its side; one that lies in two classes may be
    the last of either and stays in training."""
    of: dict[str, set[int]] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        of.setdefault(name, set()).add(label)
    once = [name for name, found in of.items() if len(found) == 1]
    alone = torch.tensor([min(of[name]) for name in once], dtype=torch.int64)
    _, held = holdout(torch.arange(len(once)), alone, TEST_SHARE, 0, site)
    return tuple(once[i] for i in held.tolist())


def _same_kind(before: _Record | None, own: Holding | None, record: Path, anew: str) -> None:
    if before is None or before.made == (DRAWN if own is None else OWN):
        return
    if own is None:
        raise UserError(
            f"{record}: this site judged by a test set of its own and now there is none: bring it back (--test)"
        )
    raise UserError(
        f"{record}: this site judges by images drawn from its data, and has trained on others: take its test set away, "
        f"or start anew with another {anew}"
    )


def _warnings(now: _Record, before: _Record | None) -> list[str]:
    """What is strange about a test set that is used as it is."""
    both = len(set(now.train) & set(now.test))
    trained = len((set(before.train) & set(now.test)) - set(before.test)) if before else 0
    tested = len((set(before.test) & set(now.train)) - set(before.train)) if before else 0
    return [
        text.format(many)
        for many, text in (
            (both, "images both for training and for testing: {}; figures of this site are too good"),
            (trained, "test images that were training images before: {}; figures of this site are too good"),
            (tested, "training images that were test images before: {}"),
        )
        if many
    ]


def _changes(before: _Record, now: _Record, judged: Holding) -> list[str]:
    came = len(set(now.train) - set(before.train)), len(set(now.test) - set(before.test))
    went = len(set(before.train) - set(now.train)), len(set(before.test) - set(judged.names))
    return [
        f"{side} images since the last start: {new} new, {gone} gone"
        for side, new, gone in zip(("training", "test"), came, went, strict=True)
        if new or gone
    ]


def _read(path: Path, anew: str) -> _Record | None:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): mend its folder") from None
    except (ValueError, RecursionError):
        table = None
    match table:
        case {"made": str(made), "train": list(train), "test": list(test)}:
            if made in (OWN, DRAWN) and all(isinstance(name, str) for name in [*train, *test]):
                return _Record(made, tuple(train), tuple(test))
    raise UserError(
        f"{path}: is damaged: bring it back from a backup, or start anew with another {anew} (test images are drawn "
        "again then, and the personal model knows some of them)"
    )
