"""A site's data: what is accepted, what is refused, how images look to the federation, and that a test image is one
for good."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.data import SiteData, load
from common.deployment import ImagesConfig
from common.errors import UserError
from common.holding import gather

CLASSES = ("cat", "dog", "fox")
COLOUR = ImagesConfig(CLASSES, size=8)
GREY = ImagesConfig(CLASSES, size=8, channels=1)
CPU = torch.device("cpu")


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (shade, 255 - shade, 7)).save(path)


def folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    for name, count in counts.items():
        for i in range(start, start + count):
            picture(root / name / f"{i:03d}.png", (40 * CLASSES.index(name) + i) % 256 if name in CLASSES else i)
    return root


def file(path: Path, labels: Sequence[int], seed: int = 0, channels: int = 1, **more: object) -> Path:
    pixels = np.random.RandomState(seed).randint(0, 256, (len(labels), 8, 8, channels)).astype(np.uint8)
    arrays = {"images": pixels, "labels": np.array(labels, dtype=np.int64), "classes": np.array(CLASSES)} | more
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def site(tmp_path: Path, place: Path, test: Path | None = None, name: str = "north") -> SiteData:
    return load(place, test, CLASSES, name, tmp_path / "splits.json")


def sides(data: SiteData) -> tuple[list[str], list[str]]:
    return data.train.names, data.test.names


# --- kinds of data ---------------------------------------------------------------------------------------------------


def test_a_folder_a_table_and_a_file_are_known_by_what_they_are(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"cat": 5, "fox": 10})
    data = site(tmp_path, root)
    assert data.counts.tolist() == [4, 0, 8]
    assert len(data.test.labels) == 3
    assert data.train.names[0].startswith("cat/")

    table = tmp_path / "table.csv"
    rows = [f"images/{name}/{i:03d}.png,{name}" for name, n in (("cat", 5), ("fox", 10)) for i in range(n)]
    table.write_text("path,label\n" + "\n".join(rows))
    assert load(table, None, CLASSES, "north", tmp_path / "b.json").counts.tolist() == [4, 0, 8]

    numbers = file(tmp_path / "numbers.npz", [0] * 5 + [2] * 10)
    assert load(numbers, None, CLASSES, "north", tmp_path / "c.json").counts.tolist() == [4, 0, 8]


@pytest.mark.parametrize("name", ["images.zip", "images.txt", "images"])
def test_what_is_accepted_is_said_where_it_is_something_else(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    with pytest.raises(UserError, match=r"no such file or folder: name a folder .* \.csv or \.parquet .* \.npz"):
        gather(place, CLASSES)
    place.write_text("x")
    with pytest.raises(UserError, match=r"is of no known kind: name a folder .* \.csv or \.parquet .* \.npz"):
        gather(place, CLASSES)


def test_a_class_that_the_federation_does_not_have_is_refused_with_its_place(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"cat": 2, "cow": 1})
    with pytest.raises(UserError, match=r"images/cow/000\.png: class 'cow' is not among the 3 known classes"):
        site(tmp_path, root)
    numbers = file(tmp_path / "a.npz", [0, 1, 2], classes=np.array(["cat", "cow", "fox"]))
    with pytest.raises(UserError, match=r"a\.npz, image 1: class 'cow'"):
        site(tmp_path, numbers)
    assert not (tmp_path / "splits.json").exists()


LOOK = """
import sys
from pathlib import Path
from common.errors import UserError
from common.holding import gather
for place in sys.argv[1:]:
    try:
        gather(Path(place), ("cat", "dog", "fox"))
        print("fine")
    except UserError as error:
        print(error)
"""


def seen_by_another(places: Sequence[Path]) -> list[str]:
    """What somebody is told who is not above the rights of files, as root is."""
    words = [sys.executable, "-c", LOOK, *map(str, places)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and setpriv is not installed (Debian: util-linux)")
        words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--", *words]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def test_what_this_user_may_not_read_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    """Above all a class whose folder is closed: it must not go missing without a word."""
    of = {"a": "a", "b/dog": "b", "c/dog/000.png": "c", "d.npz": "d.npz", "e.csv": "e.csv", "fox.png": "f.csv"}
    for name in ("a", "b", "c", "open"):
        folder(tmp_path / name, {"cat": 2, "dog": 1})
    file(tmp_path / "d.npz", [0, 1])
    for name in ("fox", "owl"):
        picture(tmp_path / f"{name}.png", 3)
    (tmp_path / "e.csv").write_text("path,label\nowl.png,fox\n")
    (tmp_path / "f.csv").write_text("path,label\nfox.png,fox\n")
    for locked in of:
        (tmp_path / locked).chmod(0)
    try:
        said = seen_by_another([tmp_path / "open", *(tmp_path / place for place in of.values())])
    finally:
        for locked in of:
            (tmp_path / locked).chmod(0o700)
    assert said == ["fine"] + [
        f"{tmp_path / locked}: the user that runs this (number {os.geteuid()}) may not read it: "
        "give it the right to, or run as the one who owns it"
        for locked in of
    ]


def test_class_numbers_are_those_of_the_federation(tmp_path: Path) -> None:
    numbers = file(tmp_path / "a.npz", [0, 1, 1, 1], classes=np.array(["fox", "cat"]))
    assert gather(numbers, CLASSES)[0].labels.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("counts", [{"cat": 1}, {"dog": 3}, {"cat": 1, "dog": 1, "fox": 1}])
def test_very_small_sites_can_take_part(tmp_path: Path, counts: dict[str, int]) -> None:
    data = site(tmp_path, folder(tmp_path / "images", counts))
    assert int(data.counts.sum()) + len(data.test.labels) == sum(counts.values())
    assert [int(data.counts[CLASSES.index(name)]) > 0 for name in counts] == [True] * len(counts)
    images = data.train.images(COLOUR, True), data.test.images(COLOUR, False)
    assert [len(side) for side in images] == [len(data.train.labels), len(data.test.labels)]


def test_an_empty_site_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="no image in any subfolder"):
        site(tmp_path, tmp_path / "images")
    with pytest.raises(UserError, match=r"images are uint8 \(0, 8, 8, 1\)"):
        site(tmp_path, file(tmp_path / "a.npz", []))


# --- images as the federation sees them ------------------------------------------------------------------------------


def first(data: SiteData, wish: ImagesConfig) -> torch.Tensor:
    x, _ = next(data.train.images(wish, True).batches(torch.tensor([0]), 1, CPU))
    return x[0]


def test_normalisation_is_the_federations_whatever_a_file_says(tmp_path: Path) -> None:
    plain = site(tmp_path, file(tmp_path / "a.npz", [0]))
    other = load(file(tmp_path / "b.npz", [0], mean=np.array([0.9]), std=np.array([3.0])), None, CLASSES, "n",
                 tmp_path / "b.json")  # fmt: skip
    pixel = float(np.load(tmp_path / "a.npz")["images"][0, 0, 0, 0])
    for wish, mean, std in ((GREY, 0.5, 0.5), (ImagesConfig(CLASSES, 8, 1, (0.2,), (0.7,)), 0.2, 0.7)):
        assert torch.equal(first(plain, wish), first(other, wish))
        assert float(first(plain, wish)[0, 0, 0]) == pytest.approx((pixel / 255 - mean) / std)


@pytest.mark.parametrize("kept", [True, False], ids=["in memory", "on disk"])
def test_image_files_are_normalised_as_the_federation_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    if not kept:
        monkeypatch.setattr("common.sources.files.KEPT", 0)
    data = site(tmp_path, folder(tmp_path / "images", {"cat": 2}))
    given = first(data, ImagesConfig(CLASSES, 8, 3, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)))
    usual = first(data, COLOUR)
    colour = torch.tensor([0.0, 255.0, 7.0]) / 255
    assert torch.allclose(given[:, 0, 0], (colour - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([1.0, 2.0, 3.0]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(usual[:, 0, 0], (colour - mean) / std)


def test_images_come_at_the_federations_size(tmp_path: Path) -> None:
    wish = ImagesConfig(CLASSES, size=5)
    assert site(tmp_path, folder(tmp_path / "images", {"cat": 2})).train.images(wish, True).side == 5
    numbers = gather(file(tmp_path / "a.npz", [0, 1], channels=3), CLASSES)[0]
    assert numbers.images(wish, True).side == 5


def test_channels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"read in colour .* save them as \.npz"):
        gather(folder(tmp_path / "images", {"cat": 1}), CLASSES)[0].images(GREY, True)
    with pytest.raises(UserError, match=r"a\.npz: its images have 1 channel\(s\), those of this federation 3"):
        gather(file(tmp_path / "a.npz", [0]), CLASSES)[0].images(COLOUR, True)


def test_augmentation_is_the_federations(tmp_path: Path) -> None:
    numbers = gather(file(tmp_path / "a.npz", [0]), CLASSES)[0]
    for said, done in (("auto", "crop"), ("none", "none"), ("crop-flip", "crop-flip")):
        wish = ImagesConfig(CLASSES, 8, 1, augment=said)  # type: ignore[arg-type]
        assert numbers.images(wish, True).augment == done  # type: ignore[attr-defined]
        assert numbers.images(wish, False).augment == "none"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="resized-crop"):
        numbers.images(ImagesConfig(CLASSES, 8, 1, augment="resized-crop"), True)


# --- training and testing --------------------------------------------------------------------------------------------


def test_the_division_is_that_of_the_first_start(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"cat": 20, "dog": 10, "fox": 1})
    train, test = sides(site(tmp_path, root))
    assert [sum(name.startswith(c) for name in test) for c in CLASSES] == [4, 2, 0]
    assert train == sorted(train)
    assert not set(train) & set(test)
    assert sides(site(tmp_path, root)) == (train, test)
    moved = root.rename(tmp_path / "elsewhere")
    again = site(tmp_path, moved)
    assert sides(again) == (train, test)
    assert again.notes == ()


def test_another_site_draws_others(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"cat": 50})
    north = load(root, None, CLASSES, "north", tmp_path / "north.json")
    assert sides(load(root, None, CLASSES, "north", tmp_path / "again.json")) == sides(north)
    assert sides(load(root, None, CLASSES, "south", tmp_path / "south.json")) != sides(north)


def test_images_that_come_later_are_for_training_and_test_images_stay_test_images(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"cat": 10, "dog": 10})
    train, test = sides(site(tmp_path, root))
    folder(root, {"cat": 30, "fox": 2}, start=10)
    away = root / test[0], root / train[0]
    kept = [path.read_bytes() for path in away]
    for path in away:
        path.unlink()

    later = site(tmp_path, root)
    assert set(later.test.names) == set(test[1:])
    assert set(later.train.names) == set(train[1:]) | {f"cat/{i:03d}.png" for i in range(10, 40)} | {
        "fox/010.png",
        "fox/011.png",
    }
    assert later.notes == (
        "training images since the last start: 32 new, 1 gone",
        "test images since the last start: 0 new, 1 gone",
    )

    for path, content in zip(away, kept, strict=True):
        path.write_bytes(content)
    back = site(tmp_path, root)
    assert set(back.test.names) == set(test)
    assert set(train) < set(back.train.names)


def test_pixels_are_known_again_in_any_order(tmp_path: Path) -> None:
    labels = [0] * 10 + [1] * 10
    train, test = sides(site(tmp_path, file(tmp_path / "a.npz", labels)))
    arrays = dict(np.load(tmp_path / "a.npz"))
    order = np.random.RandomState(1).permutation(20)
    np.savez(tmp_path / "b.npz", **(arrays | {"images": arrays["images"][order], "labels": arrays["labels"][order]}))
    again = site(tmp_path, tmp_path / "b.npz")
    assert set(again.test.names) == set(test)
    assert set(again.train.names) == set(train)
    assert again.train.names != train  # in the order of the data


def test_copies_of_an_image_are_on_one_side_and_no_class_is_left_without(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (10, 8, 8, 1)).astype(np.uint8)
    twice = np.concatenate([pixels, pixels, pixels[:1]])
    labels = np.array([0] * 20 + [1])
    np.savez(tmp_path / "a.npz", images=twice, labels=labels, classes=np.array(CLASSES))
    data = site(tmp_path, tmp_path / "a.npz")
    assert not set(data.train.names) & set(data.test.names)
    assert len(data.test.labels) == 4  # two of nine images in one class only, and their copies
    assert data.counts.tolist() == [16, 1, 0]


def test_a_test_set_of_ones_own_is_used_as_it_is(tmp_path: Path) -> None:
    root = folder(tmp_path / "images" / "train", {"cat": 3, "dog": 2}).parent
    folder(root / "test", {"cat": 2})
    data = site(tmp_path, root)
    assert data.counts.tolist() == [3, 2, 0]
    assert data.test.names == ["test/cat/000.png", "test/cat/001.png"]

    train, test = file(tmp_path / "a.npz", [2, 1, 0, 1]), file(tmp_path / "b.npz", [1, 1], seed=1)
    data = load(train, test, CLASSES, "n", tmp_path / "b.json")
    assert data.train.labels.tolist() == [2, 1, 0, 1]
    assert data.test.labels.tolist() == [1, 1]
    assert data.notes == ()

    table = tmp_path / "table.csv"
    table.write_text("path,label,split\n" + "\n".join(
        f"images/train/cat/{i:03d}.png,cat,{split}" for i, split in enumerate(["test", "train", "test"])))  # fmt: skip
    data = load(table, None, CLASSES, "n", tmp_path / "c.json")
    assert data.train.names == ["images/train/cat/001.png"]
    assert len(data.test.labels) == 2


def test_a_test_set_may_be_empty_and_that_is_said(tmp_path: Path) -> None:
    train, test = file(tmp_path / "a.npz", [0, 1]), file(tmp_path / "b.npz", [])
    data = site(tmp_path, train, test)
    assert len(data.test.labels) == len(data.test.images(GREY, False)) == 0
    assert "no image to judge by" in data.notes[0]


def test_test_images_that_were_trained_on_are_said(tmp_path: Path) -> None:
    train = file(tmp_path / "a.npz", [0] * 5)
    arrays = dict(np.load(train))
    test = tmp_path / "b.npz"
    np.savez(test, **(arrays | {"images": arrays["images"][:2], "labels": arrays["labels"][:2]}))
    assert "images both for training and for testing: 2;" in site(tmp_path, train, test).notes[0]


def test_a_test_set_that_comes_or_goes_later_is_refused(tmp_path: Path) -> None:
    train, test = file(tmp_path / "a.npz", [0] * 10), file(tmp_path / "b.npz", [0] * 2, seed=1)
    load(train, test, CLASSES, "n", tmp_path / "own.json")
    with pytest.raises(UserError, match=r"own\.json: .*bring it back \(--test\)"):
        load(train, None, CLASSES, "n", tmp_path / "own.json")
    load(train, None, CLASSES, "n", tmp_path / "drawn.json")
    with pytest.raises(UserError, match=r"drawn\.json: .*take its test set away"):
        load(train, test, CLASSES, "n", tmp_path / "drawn.json")


def test_a_test_set_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"cat": 2})
    with pytest.raises(UserError, match=r"make .*/train and .*/test"):
        site(tmp_path, root, tmp_path / "b.npz")
    with pytest.raises(UserError, match=r"images: the test images of an \.npz file are an \.npz file too"):
        site(tmp_path, file(tmp_path / "a.npz", [0]), root)


def test_a_site_with_test_images_only_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"cat": 10})
    train, test = sides(site(tmp_path, root))
    for name in train:
        (root / name).unlink()
    with pytest.raises(UserError, match="add images to train with"):
        site(tmp_path, root)
    assert json.loads((tmp_path / "splits.json").read_text())["test"] == test


@pytest.mark.parametrize("text", ["", "{", "[]", '{"made": "own"}', '{"made": "?", "train": [], "test": []}',
                                  '{"made": "own", "train": [1], "test": []}'])  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(UserError, match=r"splits\.json: is damaged: bring it back from a backup"):
        site(tmp_path, folder(tmp_path / "images", {"cat": 5}))
