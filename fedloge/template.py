"""`federation.toml` as a new federation gets it: every key with its default and what it means.

Keys, defaults, choices and comments are read from the dataclasses that parse the file, so it cannot drift from them.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common import config, deployment
from common.errors import UsageError
from common.methods import METHODS
from common.methods.method import Method

WIDTH = 120
METHOD = "fedloge+"
HIDDEN = {"evaluation.on", "run.lanes"}  # have one possible value in a federation of real sites
OPENING = """\
# The settings of a federation: every key there is, with its default.
# All but [server] and [run] travel to the sites with every round, so nothing is to be copied there by hand.
"""
SECTIONS: dict[str, tuple[Any, str]] = {
    "server": (deployment.ServerConfig, "Where the server is. Kits carry host and port: renew them after a change."),
    "images": (deployment.ImagesConfig, "What an image is, for everybody. Kits carry the classes: list them first."),
    "model": (config.ModelConfig, "What is trained."),
    "frame": (config.FrameConfig, "The fixed frame of the method fedloge and its likes; the server makes it once."),
    "train": (config.TrainConfig, "How a site trains in a round."),
    "federation": (config.FederationConfig, "Rounds: when one starts, when it counts, what is done when sites fail."),
    "evaluation": (config.EvaluationConfig, "When and how the models are judged."),
    "run": (config.RunConfig, "The machine of the server. Sites have flags of their own for theirs."),
}  # fmt: skip


def federation(given: Mapping[str, object]) -> str:
    """All settings, those of `given` (as `section.key`) with its values and the others with their defaults."""
    kinds = {**{section: kind for section, (kind, _) in SECTIONS.items()}, "method": _chosen(given)}
    known = {f"{section}.{f.name}" for section, kind in kinds.items() for f in fields(kind)}
    if unknown := given.keys() - known - {"name", "seed", "method.name"}:
        raise UsageError(f"unknown key {min(unknown)}")
    blocks = [OPENING + "\n".join(_top(given))]
    for section, (kind, meaning) in SECTIONS.items():
        blocks.append("\n".join([f"# {meaning}", f"[{section}]", *_lines(kind, f"{section}.", given)]))
        if section == "images":
            blocks.append(_method(given))
    return "\n\n".join(blocks) + "\n"


def comments(kind: type) -> dict[str, str]:
    """What stands behind the fields of a dataclass in its source, those it inherits included."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        found |= _comments(base)
    return found


def _top(given: Mapping[str, object]) -> Iterator[str]:
    said = comments(config.Config)
    for key in ("name", "seed"):
        [f] = [f for f in fields(config.Config) if f.name == key]
        yield _line(key, given.get(key, f.default), said[key])


def _method(given: Mapping[str, object]) -> str:
    names = ", ".join(sorted(METHODS))
    head = ["# What is shared, what stays at the sites, and how either is trained.", "[method]"]
    # Commented out as long as they are the defaults: they would have to go with the method they belong to.
    method = _chosen(given)
    lines = _lines(method, "method.", given)
    knobs = [line if f"method.{line.partition(' ')[0]}" in given else f"# {line}" for line in lines]
    own = ["# its own settings; other methods have others:"] if knobs else []
    return "\n".join([*head, *_wrapped(f"one of {names}"), _line("name", method.name, ""), *own, *knobs])


def _chosen(given: Mapping[str, object]) -> type[Method]:
    return METHODS[str(given.get("method.name", METHOD))]


def _lines(kind: type, prefix: str, given: Mapping[str, object]) -> Iterator[str]:
    said, hints, default = comments(kind), get_type_hints(kind), kind()
    for f in fields(kind):
        key = f"{prefix}{f.name}"
        if key in HIDDEN and key not in given:
            continue
        choices = " | ".join(get_args(hints[f.name])) if get_origin(hints[f.name]) is Literal else ""
        comment = "; ".join(filter(None, (choices, said[f.name])))
        yield _line(f.name, given.get(key, getattr(default, f.name)), comment)


def _comments(kind: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.encode().splitlines()  # the tree counts bytes
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert node.end_lineno is not None
            rest = lines[node.end_lineno - 1][node.end_col_offset :].decode()
            found[node.target.id] = rest.partition("#")[2].strip()
    return found


def _line(key: str, value: object, comment: str) -> str:
    setting = f"{key} = {toml(value)}"
    line = f"{setting:<24} # {comment}"
    if not comment:
        return setting
    return line if len(line) <= WIDTH and "\n" not in setting else "\n".join([*_wrapped(comment), setting])


def _wrapped(comment: str) -> list[str]:
    return textwrap.wrap(comment, WIDTH, initial_indent="# ", subsequent_indent="# ")


def toml(value: object) -> str:
    """A setting as TOML; texts must be printable."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        items = [toml(item) for item in value]
        line = f"[{', '.join(items)}]"
        return line if len(line) <= WIDTH - 24 else "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
