"""Published long-tailed splits: text files of `path label` lines beside the images they name.

`data.path` is the folder the paths start from. It holds one NAME_train.txt and NAME_test.txt (or NAME_val.txt):
ImageNet_LT_train.txt and ImageNet_LT_test.txt with lines like `train/n01440764/n01440764_190.JPEG 0`. A test list
elsewhere is named by `data.test_path`. Labels are whole numbers and name their classes.
"""

from pathlib import Path

from common.config import DataConfig
from common.errors import UserError
from common.images import Split
from common.sources import files


def load(config: DataConfig, classes: tuple[str, ...] = ()) -> Split:
    root = Path(config.path)
    lists = sorted(root.glob("*_train.txt"))
    if len(lists) != 1:
        raise UserError(f"{root}: has {len(lists)} files *_train.txt: put exactly one there, as ImageNet_LT_train.txt")
    stem = lists[0].name.removesuffix("_train.txt")
    beside = [root / f"{stem}_test.txt", root / f"{stem}_val.txt"]
    tests = [Path(config.test_path)] if config.test_path else [path for path in beside if path.is_file()]
    if not tests:
        raise UserError(f"{beside[0]}: no such file: put the test list there or name it in data.test_path")
    return files.load(_list(lists[0], root), _list(tests[0], root), config, classes)


def _list(path: Path, root: Path) -> files.Listing:
    paths, names = [], []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): name a text file of `path label` lines") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.rsplit(None, 1)
        if not words:
            continue
        if len(words) < 2 or not words[1].isdecimal():
            raise UserError(f"{path}, line {number}: {line!r} is not `path label` with a whole number: mend it")
        paths.append(str(root / words[0].strip()))
        names.append(str(int(words[1])))
    if not paths:
        raise UserError(f"{path}: has no lines: add one for every image")
    files.require_files(paths, path)
    return files.Listing(paths, names)
