"""What comes after training, for whoever has a model file: its answers to images, how good they are, a personal model
without any training, and the model in a form that other software runs."""

import argparse
import csv
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import torch
from torch import Tensor, nn

from client import data
from common import model_file
from common.errors import UsageError, UserError
from common.evaluation import FeatureCache, evaluate
from common.holding import ACCEPTED, gather, resolved, unlabelled
from common.images import Images, normalise, spread
from common.methods.method import Predictor, fitted
from common.model_file import Model
from common.net import best_device
from common.seeds import generator
from common.sources.files import seen
from fedloge.table import aligned, percent

BATCH = 250
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verbs(verbs: Verbs) -> None:
    parser = _verb(verbs, predict, "what a model says of images", "personal.safetensors new-images --out said.csv")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of images, an image or an .npz file")
    parser.add_argument("--out", type=Path, help="the .csv file to write (default: the terminal)")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K likeliest classes (%(default)s)")

    parser = _verb(verbs, judge, "how good a model is on labelled images", "generic.safetensors --data images/test")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help=ACCEPTED)
    parser.add_argument("--json", action="store_true", help="print one JSON object")

    parser = _verb(
        verbs, personalize, "fit a generic model to a site that did not take part, without training",
        "generic.safetensors --data images --out personal.safetensors",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help=ACCEPTED)
    parser.add_argument("--test", type=Path, metavar="PATH", help="images to judge by (default: a fifth is put aside)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model to write")

    parser = _verb(
        verbs, export, "a model for other software: .onnx, or .pt2 of torch.export",
        "personal.safetensors --out personal.onnx",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .onnx or .pt2 file to write")


def _verb(verbs: Verbs, run: Callable[[argparse.Namespace], None], text: str, words: str) -> argparse.ArgumentParser:
    name = run.__name__
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, epilog=f"example: fedloge {name} {words}")
    parser.add_argument("model", type=Path, metavar="MODEL", help="a generic or personal model (.safetensors)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (%(default)s)"
    )
    parser.set_defaults(run=run)
    return parser


def predict(options: argparse.Namespace) -> None:
    device = best_device(options.device)
    model = model_file.load(options.model, device)
    classes = model.images.classes
    top = min(options.top, int(model.meant.sum()))
    if top < 1:
        raise UsageError(f"--top = {options.top} is not possible: use 1 or more")
    names, images = unlabelled(options.images, model.images)
    header = ["class", "probability", *(f"{word}_{k}" for k in range(2, top + 1) for word in ("class", "probability"))]
    with _opened(options.out) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", *header])
        for name, probability in zip(names, _probabilities(model, images, device), strict=True):
            likeliest = probability.topk(top)
            said = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            rows.writerow([name, *(cell for c, p in said for cell in (classes[c], f"{p:.4f}"))])


def judge(options: argparse.Namespace) -> None:
    device = best_device(options.device)
    model = model_file.load(options.model, device)
    classes = model.images.classes
    everything, own = gather(options.data, classes)
    held = everything if own is None else own
    found = _judged(model, held.images(model.images, training=False), device)
    many = torch.bincount(held.labels, minlength=len(classes)).tolist()
    if options.json:
        per_class = {
            name: {"images": n, "recall": recall}
            for name, n, recall in zip(classes, many, found["per_class"], strict=True)
        }
        figures = {key: found[key] for key in ("samples", "top1", "balanced", "macro_f1", "ece")}
        print(json.dumps({"model": str(options.model), "predictor": model.predictor, **figures, "classes": per_class}))
        return
    print(f"{_called(model)}: {_figures(found)}\n")
    rows = [
        (name, str(n), "yes" if meant else "no", percent(recall))
        for name, n, meant, recall in zip(classes, many, model.meant.tolist(), found["per_class"], strict=True)
    ]
    print(aligned([("class", "images", "can answer it", "recall"), *rows]))


def personalize(options: argparse.Namespace) -> None:
    """The generic head at the site's own temperature and with its class frequencies."""
    device = best_device(options.device)
    model = model_file.load(options.model, device)
    if model.site:
        raise UserError(f"{options.model}: is the personal model of {model.site} already: name a generic one")
    if not isinstance(model.head, nn.Linear):
        raise UserError(f"{options.model}: its head ({model.predictor}) is not linear and takes no class frequencies")
    if options.out.resolve() == options.model.resolve():
        raise UsageError(f"--out {options.out}: is the generic model itself: name another file")
    name, record = options.out.stem, options.out.with_suffix(".splits.json")
    found = data.load(options.data, options.test, model.images.classes, name, record, anew="--out")
    images = found.train.images(model.images, training=True)
    head = fitted(
        model.head, model.backbone, images, torch.arange(len(images)), found.counts.to(device), device, BATCH, "fp32",
        generator(0, "temperature", name),
    )  # fmt: skip
    own = replace(model, head=head, predictor=f"{model.predictor}, own prior", meant=found.counts > 0, site=name)
    model_file.save(options.out, own)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if len(found.test.labels):
        judged_on = found.test.images(model.images, training=False)
        print(f"{_called(model)}: {_figures(_judged(model, judged_on, device))}")
        print(f"{_called(own)}: {_figures(_judged(own, judged_on, device))}")
    print(options.out)


def export(options: argparse.Namespace) -> None:
    model = model_file.load(options.model, best_device(options.device))
    write = {".onnx": _onnx, ".pt2": _pt2}.get(options.out.suffix)
    if write is None:
        raise UsageError(f"--out {options.out}: is neither .onnx nor .pt2: name one of them")
    size, channels = model.images.size, model.images.channels
    share = seen(model.images.augment, size)
    about = {
        "classes": json.dumps(model.images.classes),
        "predictor": model.predictor,
        "round": str(model.round),
        "square": f"{share:g}",
    }
    write(options.out, Exported(model).eval(), about)
    print(
        f"{options.out}: pixels uint8 (n, {size}, {size}, {channels}) -> probabilities float32 (n, {len(model.meant)})"
    )
    print(f"pixels are the middle square, {share:g} of the shorter side, brought to {size} x {size}")


class Exported(nn.Module):
    """uint8 pixels (n, size, size, channels) to the probability of every class; nothing is left to do outside."""

    mean: Tensor
    std: Tensor
    meant: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone.cpu(), model.head.cpu()
        images = resolved(model.images)
        self.size, self.channels = images.size, images.channels
        self.register_buffer("mean", spread(images.mean, images.size))
        self.register_buffer("std", spread(images.std, images.size))
        self.register_buffer("meant", model.meant)

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.head(self.backbone(normalise(pixels, self.mean, self.std)))
        return torch.softmax(logits.masked_fill(~self.meant, -torch.inf), dim=1)


def _onnx(path: Path, module: Exported, about: dict[str, str]) -> None:
    try:
        import onnxscript  # noqa: F401 (torch wants it, and says so at length)
    except ImportError:
        raise UserError("for .onnx more must be installed: pip install 'fedloge[onnx]'") from None
    for name in ("onnxscript", "onnx_ir"):  # they tell of every step
        logging.getLogger(name).setLevel(logging.WARNING)
    program = torch.onnx.export(
        module, (_example(module),), input_names=["pixels"], output_names=["probabilities"],
        dynamic_shapes={"pixels": {0: torch.export.Dim.DYNAMIC}}, dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(path, external_data=False)


def _pt2(path: Path, module: Exported, about: dict[str, str]) -> None:
    program = torch.export.export(module, (_example(module),), dynamic_shapes={"pixels": {0: torch.export.Dim.DYNAMIC}})
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})


def _example(module: Exported) -> Tensor:
    return torch.zeros(2, module.size, module.size, module.channels, dtype=torch.uint8)


def _probabilities(model: Model, images: Images, device: torch.device) -> Iterator[Tensor]:
    """Of every image, in order."""
    with torch.inference_mode():
        for x, _ in images.batches(torch.arange(len(images)), BATCH, device):
            yield from torch.softmax(model.logits(x), dim=1).cpu()


def _judged(model: Model, images: Images, device: torch.device) -> dict[str, Any]:
    cache = FeatureCache(images, device, BATCH, None)
    index = torch.arange(len(images))
    return evaluate({"it": Predictor(model.backbone, model.head)}, cache, index, (), model.meant)["it"]


def _called(model: Model) -> str:
    return f"{f'personal model of {model.site}' if model.site else 'generic model'} ({model.predictor})"


def _figures(found: dict[str, Any]) -> str:
    return (
        f"{found['samples']} images, top-1 {percent(found['top1'])} %, mean recall of classes "
        f"{percent(found['balanced'])} %, macro-F1 {percent(found['macro_f1'])}, ECE {percent(found['ece'])}"
    )


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    """The terminal; or a file that appears under its name once it is whole. Names of files need not be UTF-8."""
    if path is None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
