"""iNaturalist divided by its contributors (Hsu, Qi and Brown, "Federated Visual Classification with Real-World Data
Distribution", ECCV 2020, arXiv:2003.08082): users are the natural groups (partition.kind = "groups").

`data.path` is a folder with, in it or one of its subfolders,
  federated_train*.csv   columns user_id, image_id, class (inaturalist-user-120k.zip: 9,275 users, 1,203 classes)
  test.csv               columns image_id, class
  IMAGE_ID.jpg           the images of iNaturalist 2017 (train_val_images.tar.gz), anywhere below
The tables are published at github.com/google-research/google-research/tree/master/federated_vision_datasets.
"""

from pathlib import Path

from common.config import DataConfig
from common.errors import UserError
from common.images import Split
from common.sources import files
from common.sources.folder import find
from common.sources.manifest import read


def load(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
    root = Path(config.path)
    train, test = _table(root, "federated_train*.csv"), _table(root, "test.csv")
    places = {Path(path).stem: path for path in find(root)}
    return files.load(
        _list(train, ("image_id", "class", "user_id"), places, root),
        _list(test, ("image_id", "class"), places, root),
        config,
        classes,
    )


def _table(root: Path, pattern: str) -> Path:
    tables = sorted([*root.glob(pattern), *root.glob(f"*/{pattern}")])
    if len(tables) != 1:
        raise UserError(f"{root}: has {len(tables)} files {pattern} in it or its subfolders: put exactly one there")
    return tables[0]


def _list(table: Path, columns: tuple[str, ...], places: dict[str, str], root: Path) -> files.Listing:
    rows = read(table, columns)
    missing = [row["image_id"] for row in rows if row["image_id"] not in places]
    if missing:
        raise UserError(
            f"{table}: no image {missing[0]}.jpg below {root} ({len(missing)} such): unpack the images there"
        )
    return files.Listing(
        [places[row["image_id"]] for row in rows],
        [row["class"] for row in rows],
        [row["user_id"] for row in rows] if "user_id" in columns else None,
    )
