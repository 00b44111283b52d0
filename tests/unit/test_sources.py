"""Data sources: what each reads, and one line with a name and a mend for whatever is wrong."""

import csv
import hashlib
import io
import lzma
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import unpack
from common.config import DataConfig
from common.errors import UserError
from common.images import PixelImages
from common.sources import load
from common.sources.files import FileImages, decode

CPU = torch.device("cpu")
DATA = os.environ.get("FEDLOGE_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="FEDLOGE_DATA does not point to a folder made by benchmarks.unpack")


def draw(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> Path:
    """A picture that compresses and decodes like one: smooth, with some noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (4, 4, 3)).astype(np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def make_folder(root: Path, size: tuple[int, int] = (32, 32), suffix: str = ".png", each: int = 6) -> Path:
    for c, name in enumerate(("ant", "bee", "cat")):
        for i in range(each):
            draw(root / name / f"{i}{suffix}", 100 * c + i, size)
    return root


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def refused(config: DataConfig, *words: str, classes: tuple[str, ...] = ()) -> None:
    with pytest.raises(UserError) as raised:
        load(config, classes)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# digits


def test_digits_are_there_and_divided_the_same_way_always() -> None:
    split = load(DataConfig())
    assert (len(split.train), len(split.test), split.train.side, split.train.channels) == (1438, 359, 8, 1)
    assert torch.equal(split.test.labels, load(DataConfig()).test.labels)
    assert split.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    values = torch.cat([x for x, _ in split.train.batches(torch.arange(1438), 500, CPU)])
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02


def test_long_tail_of_the_training_images_alone() -> None:
    split = load(DataConfig(imbalance=0.1, largest=100))
    counts = split.train.labels.bincount().tolist()
    assert (counts[0], counts[-1], len(split.test)) == (100, 10, 359)
    assert load(DataConfig(largest=20)).train.labels.bincount().tolist() == [20] * 10
    assert load(DataConfig(imbalance=0.5, profile="step")).train.labels.bincount().tolist()[5:] == [73] * 5
    refused(DataConfig(imbalance=0.001), "data.imbalance = 0.001", "larger")
    refused(DataConfig(augment="resized-crop"), "data.augment", "crop-flip")


def test_images_in_memory_are_brought_to_size() -> None:
    split = load(DataConfig(size=16))
    assert (split.train.side, split.test.side) == (16, 16)


# npz


def save(path: Path, n: int = 20, kinds: int = 4, **arrays: Any) -> Path:
    rng = np.random.RandomState(n)
    images = rng.randint(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    np.savez(path, **{"images": images, "labels": np.arange(n) % kinds, **arrays})
    return path


def test_npz_with_and_without_a_test_file(tmp_path: Path) -> None:
    train = save(tmp_path / "a.npz", groups=np.arange(20) // 5, mean=np.array([0.1, 0.2, 0.3]), std=np.ones(3))
    test = save(tmp_path / "b.npz", 9, kinds=3)
    split = load(DataConfig("npz", str(train), str(test)))
    assert (len(split.train), len(split.test), split.train.classes) == (20, 9, ("0", "1", "2", "3"))
    assert split.train.groups is not None
    assert split.train.groups[:6] == ("0",) * 5 + ("1",)
    assert isinstance(split.test, PixelImages)
    assert split.test.mean == (0.1, 0.2, 0.3)
    divided = load(DataConfig("npz", str(train)))
    assert (len(divided.train), len(divided.test)) == (16, 4)


def test_npz_grey_and_the_federations_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", images=np.zeros((20, 8, 8), np.uint8), classes=np.array(["d", "c", "b", "a"]))
    split = load(DataConfig("npz", str(path), str(path)), ("a", "b", "c", "d", "e"))
    assert split.train.channels == 1
    assert split.train.classes == ("a", "b", "c", "d", "e")
    assert split.train.labels[:4].tolist() == [3, 2, 1, 0]
    refused(DataConfig("npz", str(path)), "class 'd'", "rename or remove", classes=("a", "b", "c"))


BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"images": np.zeros((20, 8, 8, 3))}, "float64"),
    ({"images": np.zeros((20, 8, 9, 3), np.uint8)}, "(n, side, side, channels)"),
    ({"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": np.zeros(0, int)}, "(n, side, side, channels)"),
    ({"labels": np.zeros(20)}, "whole number"),
    ({"labels": np.zeros(19, int)}, "one whole number for every image"),
    ({"labels": np.full(20, -1)}, "label -1 of image 0"),
    ({"classes": np.array(["a", "b", "c"])}, "label 3 of image 3 is not in 0..2"),
    ({"classes": np.array(["a", "b", "c", "a"])}, "two classes"),
    ({"groups": np.zeros(3)}, "groups"),
    ({"std": np.zeros(3)}, "std"),
    ({"mean": np.zeros(2)}, "mean"),
    ({"labels": np.array([{}] * 20, dtype=object)}, "cannot be read"),  # a pickle, never opened
]


@pytest.mark.parametrize(("arrays", "words"), BAD_ARRAYS)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    refused(DataConfig("npz", str(save(tmp_path / "bad.npz", **arrays))), "bad.npz", words)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    refused(DataConfig("npz", str(tmp_path / "none.npz")), "none.npz", "no such file")
    (tmp_path / "text.npz").write_text("hello")
    refused(DataConfig("npz", str(tmp_path / "text.npz")), "text.npz", "numpy.savez")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    refused(DataConfig("npz", str(tmp_path / "other.npz")), "'images'")
    np.save(tmp_path / "array.npy", np.zeros(3))
    refused(DataConfig("npz", str(tmp_path / "array.npy")), "single array")
    good = save(tmp_path / "good.npz")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:600])
    refused(DataConfig("npz", str(tmp_path / "cut.npz")), "cut.npz", "numpy.savez")
    few = save(tmp_path / "few.npz", images=np.zeros((20, 9, 9, 3), np.uint8))
    refused(DataConfig("npz", str(good), str(few)), "few.npz", "one size")
    more = save(tmp_path / "more.npz", kinds=5)
    refused(DataConfig("npz", str(good), str(more)), "class '4'", "more.npz")
    gap = save(tmp_path / "gap.npz", labels=np.arange(20) % 2 * 3)
    refused(DataConfig("npz", str(gap), str(good)), "no training image of class '1'")
    alone = save(tmp_path / "alone.npz", 4)
    refused(DataConfig("npz", str(alone)), "data.test_share", "test set")


# files


def test_folder_of_classes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    draw(tmp_path / "bee" / "deeper" / "x.JPG", 1)
    draw(tmp_path / ".hidden" / "x.png", 1)
    (tmp_path / "empty").mkdir()
    split = load(DataConfig("folder", str(tmp_path)))
    assert split.train.classes == ("ant", "bee", "cat")
    assert (len(split.train), len(split.test)) == (16, 3)
    assert isinstance(split.train, PixelImages)
    assert split.train.augment == "crop-flip"


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", each=2)
    split = load(DataConfig("folder", str(tmp_path), imbalance=0.5))
    assert (split.train.labels.bincount().tolist(), len(split.test)) == ([6, 4, 3], 6)
    draw(tmp_path / "val" / "dog" / "x.png", 0)
    refused(DataConfig("folder", str(tmp_path)), "dog", "x.png", "rename or remove")
    draw(tmp_path / "horse" / "x.png", 0)  # now "train" is the name of a class like any other
    assert load(DataConfig("folder", str(tmp_path))).train.classes == ("horse", "train", "val")


def test_what_can_be_wrong_with_a_folder(tmp_path: Path) -> None:
    refused(DataConfig("folder", str(tmp_path / "none")), "no such folder")
    refused(DataConfig("folder", str(tmp_path)), "no image in any subfolder", "NAME")
    make_folder(tmp_path)
    (tmp_path / "bee" / "3.png").write_bytes(b"no image")
    refused(DataConfig("folder", str(tmp_path)), "3.png", "replace or remove")
    (tmp_path / "bee" / "3.png").unlink()
    draw(tmp_path / "bee" / "9.png", 1, (32, 30))
    refused(DataConfig("folder", str(tmp_path)), "9.png", "32 x 30", "data.size")
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "bee" / "9.png")
    refused(DataConfig("folder", str(tmp_path)), "9.png", "8-bit")
    draw(tmp_path / "ant" / "0.png", 1, (40, 30))
    refused(DataConfig("folder", str(tmp_path)), "0.png", "data.size")


def passes(config: DataConfig, size: int = 5) -> list[torch.Tensor]:
    images = load(config).train
    rng = torch.Generator().manual_seed(3)
    return [x for _ in range(2) for x, _ in images.batches(torch.arange(len(images)), size, CPU, rng)]


@pytest.mark.parametrize("augment", ["resized-crop", "crop-flip", "crop", "none"])
def test_streaming_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, augment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.sources.files.KEPT", 0)
    config = DataConfig("folder", str(make_folder(tmp_path, (50, 40), ".jpg")), size=24, augment=augment)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = passes(replace(config, workers=0))
    assert first[0].shape == (5, 3, 24, 24)
    assert first[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(first[0], first[len(first) // 2])  # the second pass draws anew
    for workers in (1, 4):
        other = passes(replace(config, workers=workers))
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [0, 20])
def test_streamed_images_are_those_in_memory(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig("folder", str(make_folder(tmp_path)), size=size, augment="crop-flip")
    kept = passes(config)
    assert isinstance(load(config).train, PixelImages)
    monkeypatch.setattr("common.sources.files.KEPT", 0)
    assert isinstance(load(config).train, FileImages)
    assert all(torch.equal(a, b) for a, b in zip(kept, passes(config), strict=True))


def test_large_images_stream_with_resized_crops_and_tests_stay_in_memory(tmp_path: Path) -> None:
    split = load(DataConfig("folder", str(make_folder(tmp_path, (90, 80), ".jpg")), size=72))
    assert isinstance(split.train, FileImages)
    assert split.train.augment == "resized-crop"
    assert isinstance(split.test, PixelImages)
    assert len(split.train.take(torch.arange(0))) == 0


def test_a_pass_that_ends_early_leaves_no_threads(tmp_path: Path) -> None:
    images = load(DataConfig("folder", str(make_folder(tmp_path, (90, 80))), size=72)).train
    before = threading.active_count()
    stream = iter(images.batches(torch.arange(len(images)), 2, CPU))
    next(stream)
    assert threading.active_count() > before
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_file_that_breaks_during_training_is_named(tmp_path: Path) -> None:
    images = load(DataConfig("folder", str(make_folder(tmp_path, (90, 80))), size=72)).train
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\.png: cannot be read as an image .* replace or remove it"):
        list(images.batches(torch.arange(len(images)), 2, CPU))


def test_the_middle_square_and_the_window(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], 60, 0).repeat(3, 2)  # 60 high, 120 wide
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    path = str(tmp_path / "ramp.png")
    assert np.array_equal(decode(path, 60), ramp[:, 30:90])
    whole = decode(path, 60, (1.0, 0.5, 0.5, 0.5, 0.9))
    assert np.array_equal(decode(path, 60, (1.0, 0.5, 0.5, 0.5, 0.1)), whole[:, ::-1])
    assert decode(path, 10, (0.0, 0.0, 0.0, 0.0, 0.9)).shape == (10, 10, 3)


def test_jpegs_are_decoded_at_a_fraction_of_their_size(tmp_path: Path) -> None:
    path = str(draw(tmp_path / "big.jpg", 0, (800, 600)))
    with Image.open(path) as image:
        full = image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR, box=(100, 0, 700, 600))
    assert np.abs(decode(path, 64).astype(int) - np.asarray(full).astype(int)).max() <= 8


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged tags and huge sizes
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([".png", ".jpg", ".webp", ".tif"]), st.integers(0, 4000), st.binary(max_size=8))
def test_any_damage_gives_an_image_or_one_line(tmp_path: Path, suffix: str, at: int, put: bytes) -> None:
    good = tmp_path / f"good{suffix}"
    data = (good if good.exists() else draw(good, 0)).read_bytes()
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(data[: at % len(data)] + put + (data[at % len(data) + len(put) :] if put else b""))
    message = ""
    try:
        assert decode(str(bad), 8).shape == (8, 8, 3)
    except UserError as error:
        message = str(error)
    assert message == "" or (message.startswith(f"{bad}: ") and "\n" not in message)


# tables


def rows_of(root: Path, n: int = 8, **more: Callable[[int], str]) -> list[dict[str, Any]]:
    for i in range(n):
        draw(root / f"{i}.png", i)
    columns: dict[str, Callable[[int], str]] = {"path": lambda i: f"{i}.png", "label": lambda i: "xy"[i % 2], **more}
    return [{name: value(i) for name, value in columns.items()} for i in range(n)]


def test_manifest_csv_and_parquet(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = rows_of(
        tmp_path, group=lambda i: f"site{i // 4}", split=lambda i: "test" if i > 5 else "train", note=lambda _: ""
    )
    split = load(DataConfig("manifest", str(write_table(tmp_path / "t.csv", rows))))
    assert (split.train.classes, split.train.labels.tolist()) == (("x", "y"), [0, 1, 0, 1, 0, 1])
    assert split.train.groups == ("site0",) * 4 + ("site1",) * 2
    assert len(split.test) == 2
    parquet.write_table(Table.from_pylist(rows), tmp_path / "t.parquet")
    same = load(DataConfig("manifest", str(tmp_path / "t.parquet")))
    assert torch.equal(same.train.pixels, split.train.pixels)  # type: ignore[attr-defined]
    plain = write_table(tmp_path / "p.csv", [{k: row[k] for k in ("path", "label")} for row in rows])
    assert len(load(DataConfig("manifest", str(plain), test_share=0.25)).test) == 2
    assert len(load(DataConfig("manifest", str(plain), str(plain))).test) == 8


def test_numbers_name_classes_in_their_order(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, label=lambda i: str([10, 9][i % 2]))
    path = str(write_table(tmp_path / "t.csv", rows))
    assert load(DataConfig("manifest", path, path)).train.classes == ("9", "10")
    split = load(DataConfig("manifest", path, path), ("10", "11", "9"))
    assert split.train.labels[:2].tolist() == [0, 2]


def test_what_can_be_wrong_with_a_manifest(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    table = tmp_path / "t.csv"

    def with_row(**changes: str) -> DataConfig:
        return DataConfig("manifest", str(write_table(table, [{"split": "train", **rows[0], **changes}, *(
            {"split": "test", **row} for row in rows)])))  # fmt: skip

    refused(with_row(path="none.png"), "none.png is not there", "t.csv")
    refused(with_row(label=""), "row 1", "label is empty")
    refused(with_row(split="dev"), "row 1", "train or test")
    refused(with_row(), "class 'y'", "1.png")
    refused(DataConfig("manifest", str(write_table(table, [{"path": "0.png"}]))), "no column 'label'")
    table.write_text("path,label\n")
    refused(DataConfig("manifest", str(table)), "no rows")
    table.write_bytes(b"path,label\n\xff\xfe,1\n")
    refused(DataConfig("manifest", str(table)), "UTF-8")
    (tmp_path / "t.parquet").write_bytes(b"hello")
    refused(DataConfig("manifest", str(tmp_path / "t.parquet")), "t.parquet", "Parquet")
    refused(DataConfig("manifest", str(tmp_path / "none.csv")), "no such file")


def test_published_lists(tmp_path: Path) -> None:
    for i in range(6):
        draw(tmp_path / "train" / "n01" / f"{i} .png", i)
    lines = [f"train/n01/{i} .png {i % 3}" for i in range(6)]
    (tmp_path / "ImageNet_LT_train.txt").write_text("\n".join(lines) + "\n\n")
    refused(DataConfig("lists", str(tmp_path)), "ImageNet_LT_test.txt")
    (tmp_path / "ImageNet_LT_test.txt").write_text("\n".join(lines[:3]))
    split = load(DataConfig("lists", str(tmp_path)))
    assert (split.train.labels.tolist(), split.test.labels.tolist()) == ([0, 1, 2, 0, 1, 2], [0, 1, 2])
    (tmp_path / "ImageNet_LT_test.txt").write_text("train/n01/0.png")
    refused(DataConfig("lists", str(tmp_path)), "ImageNet_LT_test.txt, line 1", "path label")
    (tmp_path / "ImageNet_LT_test.txt").write_text("train/n01/7.png 1")
    refused(DataConfig("lists", str(tmp_path)), "7.png is not there")
    refused(DataConfig("lists", str(tmp_path / "train")), "0 files *_train.txt")


def test_inaturalist_users_are_groups(tmp_path: Path) -> None:
    tables = tmp_path / "inaturalist-user-120k"
    tables.mkdir()
    for i in range(6):
        draw(tmp_path / "train_val_images" / "Aves" / "Pica" / f"hash{i}.jpg", i)
    train = [{"user_id": str(i // 3), "image_id": f"hash{i}", "class": str(i % 2), "label": "9"} for i in range(6)]
    write_table(tables / "federated_train_user_120k.csv", train)
    refused(DataConfig("inaturalist", str(tmp_path)), "test.csv")
    write_table(tables / "test.csv", [{"image_id": "hash1", "class": "1"}])
    split = load(DataConfig("inaturalist", str(tmp_path)))
    assert split.train.groups == ("0", "0", "0", "1", "1", "1")
    assert (split.train.labels.tolist(), split.test.labels.tolist()) == ([0, 1, 0, 1, 0, 1], [1])
    assert split.test.groups is None
    write_table(tables / "test.csv", [{"image_id": "hash7", "class": "1"}])
    refused(DataConfig("inaturalist", str(tmp_path)), "hash7.jpg", "unpack the images")


# CIFAR


@pytest.mark.parametrize(("source", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_cifar_missing_or_altered(tmp_path: Path, source: Any, folder: str) -> None:
    refused(DataConfig(source, str(tmp_path)), folder, "unpack")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "data_batch_1").write_bytes(b"not the original: never unpickled")
    refused(DataConfig(source, str(tmp_path)), folder, "original files")


@needs_data
def test_cifar10_long_tailed() -> None:
    split = load(DataConfig("cifar10", DATA, imbalance=0.01))
    assert (len(split.train), len(split.test)) == (12406, 10000)
    assert (split.train.classes[0], split.train.labels.bincount().tolist()[-1]) == ("airplane", 50)


@needs_data
def test_cifar100_long_tailed() -> None:
    path, test = Path(DATA, "cifar100_lt100_train.npz"), Path(DATA, "cifar100_test.npz")
    split = load(DataConfig("npz", str(path), str(test), augment="crop-flip"))
    assert (len(split.train), len(split.test), len(split.train.classes)) == (10847, 10000, 100)


# benchmarks.unpack


def pack(path: Path, images: np.ndarray[Any, Any], **arrays: Any) -> None:
    strips = []
    for start in range(0, len(images), 4):
        strip, buffer = images[start : start + 4], io.BytesIO()
        Image.fromarray(strip.reshape(-1, images.shape[2], 3)).save(buffer, "WEBP", lossless=True, exact=True)
        strips.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, strips)])
    webp = np.frombuffer(b"".join(strips), np.uint8)
    np.savez(path, webp=webp, offs=offsets, hw=np.array(images.shape[1:3]), **arrays)


def test_unpack_restores_files_and_skips_what_is_there(tmp_path: Path) -> None:
    packs, out = tmp_path / "packs", tmp_path / "out"
    packs.mkdir()
    images = np.random.RandomState(0).randint(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    files = [b"head%d" % k + images[5 * k : 5 * k + 5].transpose(0, 3, 1, 2).tobytes() + b"tail" for k in range(2)]
    original = {
        "pk_files": np.array(["data_batch_1", "data_batch_5"]),
        "pk_md5": np.array([hashlib.md5(data).hexdigest() for data in files]),
        "pk_cut": np.array([[5, 4], [5, 4]]),
        "pk_frame": np.frombuffer(lzma.compress(b"head0tailhead1tail"), np.uint8),
        "meta": np.frombuffer(b"meta", np.uint8),
        "meta_name": np.array("batches.meta"),
    }
    labels = np.arange(10, dtype=np.uint8) % 2
    pack(packs / "cifar10_train.npz", images, labels=labels, **original)
    pack(packs / "cifar100_lt_train.npz", images, labels=labels, in_if100=labels == 1)
    pack(packs / "gtsrb32_train.npz", images, labels=labels, track=np.arange(10) // 4)
    done = dict(unpack.unpack(packs, out))
    assert done["cifar-10-batches-py/data_batch_5"] == "written"
    assert done["cifar100_test.npz"].startswith("no cifar100_test.npz in")
    for name, data in zip(("data_batch_1", "data_batch_5"), files, strict=True):
        assert (out / "cifar-10-batches-py" / name).read_bytes() == data
    half = load(DataConfig("npz", str(out / "cifar100_lt100_train.npz"), test_share=0.2))
    assert len(half.train) + len(half.test) == 5
    signs = load(DataConfig("npz", str(out / "gtsrb_train.npz"))).train
    assert signs.groups is not None
    assert set(signs.groups) <= {f"0{c}-0000{t}" for c in (0, 1) for t in (0, 1, 2)}
    assert set(dict(unpack.unpack(packs, out)).values()) >= {"kept"}
    (out / "cifar-10-batches-py" / "data_batch_5").unlink()
    original["pk_md5"] = np.array(["0" * 32] * 2)
    pack(packs / "cifar10_train.npz", images, labels=labels, **original)
    with pytest.raises(UserError, match="another md5"):
        list(unpack.unpack(packs, out))
    assert not (out / "cifar-10-batches-py" / "data_batch_5").exists()
