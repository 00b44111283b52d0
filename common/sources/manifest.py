"""A table of images: a CSV file with a header, or a Parquet file.

Columns: `path` (from the table's own folder, or absolute), `label` (name or number of the class), and, if you like,
`group` (natural group: writer, camera, hospital) and `split` (train or test). The test set is the table in
`data.test_path`, else the rows whose split is test, else `data.test_share` of every class. Other columns are passed
over.
"""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config import DataConfig
from common.errors import UserError
from common.images import Split
from common.sources import files

Row = Mapping[str, Any]


def load(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
    test = Path(config.test_path) if config.test_path else None
    return files.load(*listings(Path(config.path), test), config, classes)


def listings(path: Path, test_path: Path | None) -> tuple[files.Listing, files.Listing | None]:
    """What there is to train with and, where a table says so, to test with."""
    rows = read(path, ("path", "label"))
    if test_path is not None:
        test: files.Listing | None = _list(read(test_path, ("path", "label")), test_path)
    else:
        for number, row in enumerate(rows, 1):
            if "split" in row and row["split"] not in ("train", "test"):
                raise UserError(f"{path}, row {number}: split = {row['split']!r}: write train or test")
        held = [row for row in rows if row.get("split") == "test"]
        rows = [row for row in rows if row.get("split") != "test"]
        test = _list(held, path) if held else None
    if not rows:
        raise UserError(f"{path}: has no row to train with: add some")
    return _list(rows, path), test


def _list(rows: Iterable[Row], table: Path) -> files.Listing:
    rows = list(rows)
    paths = [str(table.parent / row["path"]) for row in rows]
    files.require_files(paths, table)
    groups = [row["group"] for row in rows] if rows and "group" in rows[0] else None
    return files.Listing(paths, [row["label"] for row in rows], groups)


def read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a table as texts; the named columns must be there, and no cell of any that is read is
    empty."""
    try:
        found, rows = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    except PermissionError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name a CSV or Parquet table of images") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}): save it as CSV (UTF-8) or Parquet") from None
    for column in columns:
        if column not in found:
            raise UserError(f"{path}: has no column {column!r}: name its columns {', '.join(columns)}")
    wanted = [column for column in (*columns, "group", "split") if column in found]
    table = []
    for number, row in enumerate(rows, 1):
        for column in wanted:
            if row[column] is None or row[column] == "":
                raise UserError(f"{path}, row {number}: {column} is empty: fill it in or remove the row")
        table.append({column: str(row[column]) for column in wanted})
    if not table:
        raise UserError(f"{path}: has no rows: add one for every image")
    return table


def _csv(path: Path) -> tuple[list[str], list[Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(reader)


def _parquet(path: Path) -> tuple[list[str], list[Row]]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    return table.column_names, table.to_pylist()
