"""`fedloge shares`: what every site of a simulated federation would hold, as files for real ones.

A real federation on these files, with the settings of the experiment, `federation.fold = "name"` and one thread, gives
the same bits as `fedloge simulate`. Written are OUT/site-000.npz with the training images of that site in its order,
OUT/site-000-test.npz with those it is judged by, and OUT/test.npz with the global test set.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import config
from common.deployment import ImagesConfig
from common.errors import UserError
from common.images import Images, PixelImages
from common.model_file import described
from fedloge.federation import assemble

EXAMPLE = "example: fedloge shares fedloge/demo.toml /tmp/shares"


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("shares", help="write what the sites of an experiment hold", epilog=EXAMPLE)
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the experiment")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    experiment = config.load(options.file, options.set)
    sites, images = write(experiment, options.out)
    if options.json:
        print(json.dumps({"folder": str(options.out), "sites": sites, "images": asdict(images)}))
        return
    print(f"{len(sites)} sites in {options.out}; an image there is, for federation.toml:\n\n[images]")
    for key, value in asdict(images).items():
        print(f"{key} = {json.dumps(value, ensure_ascii=False)}")


def write(experiment: config.Config, out: Path) -> tuple[list[str], ImagesConfig]:
    """The files of all sites; gives their names, and what of federation.toml makes images equal to the simulation's."""
    federation = assemble(experiment, out)
    images, test = _pixels(federation.images), _pixels(federation.test)
    out.mkdir(parents=True, exist_ok=True)
    for name, site in federation.sites.items():
        _save(out / f"{name}.npz", images, site.train_index)
        _save(out / f"{name}-test.npz", test, federation.judged_on[name])
    _save(out / "test.npz", test, federation.global_index)
    return sorted(federation.sites), described(images)


def _pixels(images: Images) -> PixelImages:
    if not isinstance(images, PixelImages):
        raise UserError(
            "the images of this experiment stay on disk, so there is nothing to share out: give each site its own "
            "folder, or use a smaller data.size and another data.augment than resized-crop"
        )
    return images


def _save(path: Path, images: PixelImages, index: Tensor) -> None:
    index = index.to(torch.int64)  # an empty one may be of any kind
    arrays = {
        "images": images.pixels[index].numpy(),
        "labels": images.labels[index].numpy(),
        "classes": np.array(images.classes),
        "mean": np.array(images.mean),
        "std": np.array(images.std),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)
