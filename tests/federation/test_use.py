"""What is done with model files: docs/models.md as written, and everything it promises, checked against the model."""

import csv
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common import config, model_file, models, statistics
from common.config import ModelConfig
from common.deployment import ImagesConfig
from common.methods.fedetf import EtfHead
from common.model_file import Model
from fedloge import main
from fedloge.simulate import simulate
from tests import pictures

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
SIZE = 12


def made(
    architecture: str = "cnn", head: str = "linear", site: str = "", channels: int = 3, size: int = SIZE,
    augment: Any = "none",
) -> Model:  # fmt: skip
    torch.manual_seed(1)
    wish = ImagesConfig(pictures.CLASSES, size, channels, (0.4,) * channels, (0.3,) * channels, augment)
    config = ModelConfig(name=architecture, width=16)
    backbone = models.build(config, channels, size).eval()
    for name, t in backbone.named_buffers():
        if "running" in name:
            t.uniform_(0.5, 1.5)
    last: nn.Module = nn.Linear(backbone.feature_dim, 3)
    if head == "etf":
        last = EtfHead(nn.Linear(backbone.feature_dim, 3), torch.randn(3, 3), torch.tensor(4.0))
    meant = torch.tensor([True, not site, True])
    return Model(config, wish, backbone, last.requires_grad_(False), "it", 7, meant, site)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a generic and a personal model and images, in which commands are given."""
    monkeypatch.chdir(tmp_path)
    model_file.save(tmp_path / "generic.safetensors", made())
    model_file.save(tmp_path / "personal.safetensors", made(site="north"))
    pictures.write(tmp_path / "images")
    shutil.copytree(tmp_path / "images", tmp_path / "new-images")
    return tmp_path


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    yield
    logging.getLogger().setLevel(logging.WARNING)


def fedloge(*words: object) -> None:
    assert main.run([str(word) for word in words]) == 0


def probabilities(model: Model, path: Path) -> Tensor:
    """Of an image file, by hand."""
    image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    x = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255
    return torch.softmax(model.logits((x - 0.4) / 0.3), dim=1)[0]


def test_the_page_works_as_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```sh models\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        program, *words = shlex.split(line)
        assert program == ".venv/bin/fedloge"
        fedloge(*words)
    for name in ("said.csv", "own.safetensors", "own.splits.json", "personal.onnx", "personal.pt2"):
        assert (place / name).stat().st_size
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generic", "personal"])
def test_what_is_said_of_images_is_what_the_model_says(place: Path, name: str) -> None:
    fedloge("predict", f"{name}.safetensors", "new-images", "--top", 3, "--out", "said.csv")
    with (place / "said.csv").open() as file:
        header, *rows = csv.reader(file)
    allowed = 2 if name == "personal" else 3
    assert (
        header
        == ["image", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"][: 1 + 2 * allowed]
    )
    assert len(rows) == 30
    model = model_file.load(place / f"{name}.safetensors")
    for path, *said in rows:
        by_hand = probabilities(model, place / "new-images" / path).topk(allowed)
        assert said[::2] == [pictures.CLASSES[c] for c in by_hand.indices]
        assert [float(p) for p in said[1::2]] == pytest.approx(by_hand.values.tolist(), abs=1e-3)
    if name == "personal":
        assert not any("crow" in row for row in rows), "a class its site has no images of"


@pytest.mark.usefixtures("place")
def test_one_image_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    fedloge("predict", "generic.safetensors", "new-images/owl/3.png")
    assert capsys.readouterr().out.splitlines()[1].startswith("3.png,")


def test_an_npz_needs_no_labels_to_be_predicted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(place / "x.npz", images=np.zeros((4, SIZE, SIZE, 3), np.uint8))
    fedloge("predict", "generic.safetensors", "x.npz")
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == ["image", "0", "1", "2", "3"]


def test_it_is_judged_as_the_federation_judged_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = config.load(ROOT / "fedloge" / "demo.toml", ["federation.rounds=2"])
    result = simulate(experiment, tmp_path / "run", lambda _: None)
    fedloge("shares", ROOT / "fedloge" / "demo.toml", tmp_path / "shares", "--json")
    capsys.readouterr()
    [(predictor, figures), *_] = result["generic"].items()
    fedloge("judge", tmp_path / "run/models/generic.safetensors", "--data", tmp_path / "shares/test.npz", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["predictor"] == predictor
    assert {key: found[key] for key in ("top1", "balanced", "ece")} == {
        key: pytest.approx(figures[key]) for key in ("top1", "balanced", "ece")
    }
    [(_, at_sites), *_] = result["personal"].items()
    for site, top1 in at_sites["per_site"].items():
        model = tmp_path / "run" / "models" / "personal" / f"{site}.safetensors"
        fedloge("judge", model, "--data", tmp_path / "shares" / f"{site}-test.npz", "--json")
        assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(top1)


def test_recall_is_told_of_every_class(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "images" / "jay")
    fedloge("judge", "personal.safetensors", "--data", "images")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("personal model of north (it): 20 images, top-1 ")
    assert [line.split()[:3] for line in said[4:]] == [["owl", "10", "yes"], ["crow", "10", "no"], ["jay", "0", "yes"]]
    assert said[5].split()[3] == "0.0", "it cannot say crow"
    assert said[6].split()[3] == "-"


def test_a_newcomers_head_is_the_generic_one_with_its_prior(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "images" / "jay")
    for number in range(2, 10):
        (place / "images" / "crow" / f"{number}.png").unlink()
    fedloge("personalize", "generic.safetensors", "--data", "images", "--out", "own.safetensors")
    generic, own = model_file.load(place / "generic.safetensors"), model_file.load(place / "own.safetensors")
    record = json.loads((place / "own.splits.json").read_text())
    counts = [sum(name.startswith(c) for name in record["train"]) for c in pictures.CLASSES]
    assert counts == [8, 2, 0]
    assert own.meant.tolist() == [True, True, False]
    f = torch.rand(5, 16)
    prior = statistics.log_frequencies(torch.tensor(counts))
    ratio = (own.head(f) - prior.float()) / generic.head(f)
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3), "one temperature"
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in said[:2]] == ["generic model", "personal model of own"]
    before = (place / "own.safetensors").read_bytes()
    fedloge("personalize", "generic.safetensors", "--data", "images", "--out", "own.safetensors")
    assert (place / "own.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("architecture", "head", "site"),
    [
        ("mlp", "linear", "north"),
        ("cnn", "etf", ""),
        ("resnet8", "linear", ""),
        ("torchvision/mobilenet_v3_small", "linear", "x"),
    ],
)
def test_other_software_gets_the_same_probabilities(tmp_path: Path, architecture: str, head: str, site: str) -> None:
    model = made(architecture, head, site)
    model_file.save(tmp_path / "m.safetensors", model)
    for suffix in ("onnx", "pt2"):
        fedloge("export", tmp_path / "m.safetensors", "--out", tmp_path / f"m.{suffix}")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    about: dict[str, str] = {"about.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=about).module()
    for metadata in (session.get_modelmeta().custom_metadata_map, json.loads(about["about.json"])):
        assert json.loads(metadata["classes"]) == list(pictures.CLASSES)
    for many in (1, 5):
        pixels = torch.randint(0, 256, (many, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(many)).byte()
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
        with torch.no_grad():
            wanted = torch.softmax(model.logits(x), dim=1)
        assert torch.allclose(program(pixels), wanted, atol=1e-5)
        [found] = session.run(None, {"pixels": pixels.numpy()})
        assert np.allclose(found, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize(("size", "share"), [(64, 1.0), (96, 0.875)])
def test_other_software_is_told_which_square_of_an_image_it_wants(
    place: Path, size: int, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made(size=size, augment="auto")
    model_file.save(place / "m.safetensors", model)
    pixels = torch.randint(0, 256, (128, 160, 3), generator=torch.Generator().manual_seed(1)).byte()
    Image.fromarray(pixels.numpy()).save(place / "x.png")
    fedloge("export", "m.safetensors", "--out", "m.pt2")
    assert f"the middle square, {share:g} of the shorter side, brought to {size} x {size}" in capsys.readouterr().out
    fedloge("predict", "m.safetensors", "x.png", "--top", 3)
    _, *said = capsys.readouterr().out.splitlines()[1].split(",")
    about: dict[str, str] = {"about.json": ""}
    program = torch.export.load(place / "m.pt2", extra_files=about).module()
    edge = 128 * float(json.loads(about["about.json"])["square"])
    box = ((160 - edge) / 2, (128 - edge) / 2, (160 + edge) / 2, (128 + edge) / 2)
    square = Image.open(place / "x.png").resize((size, size), Image.Resampling.BILINEAR, box=box)
    likeliest = program(torch.tensor(np.asarray(square))[None])[0].topk(3)
    assert said[::2] == [pictures.CLASSES[c] for c in likeliest.indices]
    assert [float(p) for p in said[1::2]] == pytest.approx(likeliest.values.tolist(), abs=2e-4)


@pytest.mark.parametrize("head", ["linear", "etf"])
def test_a_file_holds_all_of_a_model(tmp_path: Path, head: str) -> None:
    model = made("resnet8", head, "north")
    model_file.save(tmp_path / "m.safetensors", model)
    found = model_file.load(tmp_path / "m.safetensors")
    x = torch.randn(4, 3, SIZE, SIZE)
    assert found.logits(x).equal(model.logits(x))
    assert replace(found, backbone=model.backbone, head=model.head, meant=model.meant) == model
    assert found.meant.equal(model.meant)


def test_a_shared_backbone_is_found_beside_or_above_if_it_is_the_one(tmp_path: Path) -> None:
    model = made(site="north")
    (tmp_path / "personal").mkdir()
    path = tmp_path / "personal" / "north.safetensors"
    model_file.save(path, model, shared=True)
    fails("its backbone is that of another .*generic.safetensors than is there", "predict", path, tmp_path)
    other = made()
    next(other.backbone.parameters()).data += 1
    model_file.save(tmp_path / "personal" / "generic.safetensors", other)
    fails("its backbone is that of another .*generic.safetensors than is there", "predict", path, tmp_path)
    model_file.save(tmp_path / "generic.safetensors", made())
    x = torch.randn(4, 3, SIZE, SIZE)
    assert model_file.load(path).logits(x).equal(model.logits(x))


def fails(why: str, *words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: said.append(text))
        assert main.run([str(word) for word in words]) in (1, 2)
    assert re.search(why, said[-1]), said


def test_what_cannot_be_used_is_told_in_a_line(place: Path) -> None:
    own = ("--out", place / "o.safetensors", "--data", "images")
    fails("is the personal model of north already", "personalize", "personal.safetensors", *own)
    model_file.save(place / "etf.safetensors", made(head="etf"))
    fails("is not linear", "personalize", "etf.safetensors", *own)
    fails("neither .onnx nor .pt2", "export", "generic.safetensors", "--out", "m.bin")
    fails("no image there", "predict", "generic.safetensors", "nowhere")
    fails("use 1 or more", "predict", "generic.safetensors", "images", "--top", "0")
    (place / "images" / "eagle").mkdir()
    shutil.copy(place / "images" / "owl" / "0.png", place / "images" / "eagle")
    fails("eagle", "judge", "generic.safetensors", "--data", "images")
    grey = made(channels=1)
    model_file.save(place / "grey.safetensors", grey)
    fails("grey", "predict", "grey.safetensors", "new-images")
    content = bytearray((place / "generic.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "broken.safetensors").write_bytes(content)
    fails("damaged", "judge", "broken.safetensors", "--data", "new-images")


def test_a_table_is_whole_or_the_one_before(place: Path) -> None:
    (place / "said.csv").write_text("before")
    odd = os.fsencode(place / "new-images") + b"/M\xfcller.png"
    shutil.copy(os.fsencode(place / "new-images" / "owl" / "0.png"), odd)
    fedloge("predict", "generic.safetensors", "new-images", "--out", "said.csv")
    assert b"M\xfcller.png," in (place / "said.csv").read_bytes()
    before = (place / "said.csv").read_bytes()
    (place / "new-images" / "z.png").write_bytes(b"no image")
    fails("z.png: cannot be read as an image", "predict", "generic.safetensors", "new-images", "--out", "said.csv")
    assert (place / "said.csv").read_bytes() == before
    assert sorted(path.name for path in place.iterdir() if path.is_file()) == [
        "generic.safetensors", "personal.safetensors", "said.csv"
    ]  # fmt: skip


def test_a_newcomers_options_are_those_of_this_command(place: Path) -> None:
    own = ("personalize", "generic.safetensors", "--data", "images", "--out")
    fails("is the generic model itself", *own, "generic.safetensors")
    model_file.load(place / "generic.safetensors")
    fedloge(*own, "own.safetensors")
    (place / "both").mkdir()
    shutil.copytree(place / "images", place / "both" / "train")
    shutil.copytree(place / "images", place / "both" / "test")
    fails("start anew with another --out", *own[:3], "both", "--out", "own.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"classes": "[" * 100_000},
        {"classes": "7"},
        {"model": json.dumps({"name": "cnn", "width": 16, "weights": "/etc/passwd"}), "round": "x"},
        {"model": json.dumps({"name": "cnn", "width": 17})},
        {"images": "[]"},
        {"trained_classes": "[]"},
        {"classes": json.dumps(["a", "b", "c", "d"]), "trained_classes": json.dumps(["a"])},
    ],
)
def test_what_a_file_says_need_not_be_true(
    tmp_path: Path, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model_file.parts.save
    monkeypatch.setattr(
        model_file.parts, "save", lambda path, tensors, about, **more: real(path, tensors, {**about, **change}, **more)
    )
    model_file.save(tmp_path / "m.safetensors", made())
    fails("m.safetensors: is no model of this version of fedloge", "predict", tmp_path / "m.safetensors", tmp_path)


@pytest.mark.parametrize("wrong", [{"head.weight": (5, 16)}, {"head.weight": (3, 7)}, {"head.bias": (2,)}])
def test_a_head_that_does_not_fit_is_refused(
    tmp_path: Path, wrong: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model_file.parts.save
    changed = {name: torch.zeros(shape) for name, shape in wrong.items()}
    monkeypatch.setattr(
        model_file.parts, "save", lambda path, tensors, about, **more: real(path, {**tensors, **changed}, about, **more)
    )
    model_file.save(tmp_path / "m.safetensors", made())
    fails("m.safetensors: is no model of this version of fedloge", "predict", tmp_path / "m.safetensors", tmp_path)


@pytest.mark.parametrize("key", ["model", "images", "backbone", "trained_classes"])
def test_a_file_of_an_earlier_version_is_told_apart(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_file.parts.save
    monkeypatch.setattr(
        model_file.parts, "save",
        lambda path, tensors, about, **more: real(path, tensors, {k: v for k, v in about.items() if k != key}, **more),
    )  # fmt: skip
    model_file.save(tmp_path / "m.safetensors", made())
    fails(
        f"no model of this version of fedloge \\({key} is missing\\)", "predict", tmp_path / "m.safetensors", tmp_path
    )
