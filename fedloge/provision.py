"""`fedloge init`, `join`, `invite` and `revoke`: a new federation, and how sites come into it and out of it."""

import argparse
import json
import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import deployment, files
from common.deployment import ImagesConfig, ServerConfig
from common.errors import UsageError, UserError
from common.register import grouped, registry, revoke, when
from fedloge import template

MODEL = "resnet18"  # of a new federation; small enough for any GPU, and for a CPU with patience

INIT = """{name} is in {folder}. Sites compare this fingerprint with what they are shown, by telephone or in person:

    {fingerprint}

next: {todo}`fedloge invite {folder} NAME` for every site, then `fedloge server {folder}`
Keep a copy of {folder}/pki where nobody else can read it: whoever has ca.key can invite sites."""

JOIN = """key      {key} stays here: do not send it to anybody
request  {request} is for the operator (it is also printed, and no secret)
         fingerprint of the key: {fingerprint}
next: the operator runs `fedloge invite DIR {name} --csr {name}.csr`, which shows the same fingerprint,
and sends {name}.kit back; put it beside {name}.key and run `fedloge client {name}.kit --data PATH`"""

INVITE = """kit          {kit} for site {name}, valid until {expires}
federation   {fingerprint}
key of site  {key_fingerprint}
{key}
next: at the site `fedloge client {name}.kit --data PATH`; have it compare the fingerprint of the federation"""
WITHOUT_KEY = """The kit has no key in it: it is of use only beside {name}.key, which never left the site. Before you
send it, ask the site whether `fedloge join` showed the same fingerprint of the key."""
WITH_KEY = """The kit has the site's key in it, made here: whoever gets hold of the file can take part as {name},
and you have held the key. Send it by a channel nobody else can read, then delete it here. To have the key made at
the site, where it stays, use `fedloge join {name}` there and --csr here."""
WITHDRAWN = """{name} is revoked: the server does not let it take part any more.
To take it in again, give it a new key: fedloge invite {folder} {name} --renew{csr}"""


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _verb(
        verbs, "init", init, "make a new federation", "fedloge init study --host fl.example.org --classes cat,dog,fox"
    )
    _folder(parser, "its folder, new or empty")
    parser.add_argument(
        "--host", required=True, metavar="NAME[:PORT]", help="name or address by which sites reach the server"
    )
    parser.add_argument("--classes", metavar="FILE|LIST", help="names of all classes: a file of lines, or cat,dog,...")
    parser.add_argument("--name", help="name of the federation (default: that of the folder)")

    parser = _verb(verbs, "join", join, "make a site's key and its request, at the site", "fedloge join hospital-a")
    _site(parser)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to (default: here)")

    example = "fedloge invite study hospital-a --csr hospital-a.csr"
    parser = _verb(verbs, "invite", invite, "make the kit a site starts from", example)
    _folder(parser)
    _site(parser)
    parser.add_argument("--csr", type=Path, metavar="FILE", help="the site's request; without it the key is made here")
    parser.add_argument("--days", type=int, default=365, help="how long the kit is valid (%(default)s)")
    parser.add_argument("--renew", action="store_true", help="replace the kit of a site that has one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the kit (default: DIR/kits/NAME.kit)")

    parser = _verb(verbs, "revoke", withdraw, "let a site take part no more", "fedloge revoke study hospital-a")
    _folder(parser)
    _site(parser)


def init(options: argparse.Namespace) -> None:
    folder: Path = options.dir
    host, port = address(options.host)
    classes = class_list(options.classes) if options.classes is not None else ()
    name = folder.resolve().name if options.name is None else options.name
    fingerprint = create(folder, name, host, port, {"images.classes": classes, "model.name": MODEL})
    table = {
        "folder": str(folder),
        "settings": str(folder / "federation.toml"),
        "federation": name,
        "fingerprint": fingerprint,
        "host": host,
        "port": port,
        "classes": len(classes),
    }
    todo = "" if classes else f"list the classes in {folder}/federation.toml, "
    _print(options, table, INIT.format(name=name, folder=folder, fingerprint=grouped(fingerprint), todo=todo))


def create(folder: Path, name: str, host: str, port: int, settings: Mapping[str, object]) -> str:
    """A new federation in `folder`, all of it or nothing, with these settings; gives its fingerprint."""
    from common import pki

    if not (name.isprintable() and 0 < len(name.encode()) <= 64 and "/" not in name):
        raise UsageError(f"{name!r} is no name for a federation: give it one of up to 64 letters with --name")
    given = {**settings, "name": name, "server.host": host, "server.port": port}
    new = not folder.exists()
    if not new:
        _refuse_full(folder)
    folder = folder.resolve()
    work = (folder.parent if new else folder) / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    work.mkdir(parents=True)
    try:
        fingerprint = pki.init(work, host, name)
        files.write(work / "federation.toml", template.federation(given))
        if new:
            work.rename(folder)
        else:  # it may be a mount or somebody's working directory; the settings last, they make it a federation
            for place in ("pki", "sites", "kits", "federation.toml"):
                (work / place).rename(folder / place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return fingerprint


def join(options: argparse.Namespace) -> None:
    from common import kit

    kit.check_name(options.name)
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / f"{options.name}.key").exists():
        print("there is a key already: it is kept, and the request is for it", file=sys.stderr)
    fingerprint, key, request = kit.join(options.name, options.out)
    csr = request.read_text(encoding="utf-8")
    table = {"name": options.name, "key": str(key), "request": str(request), "key_fingerprint": fingerprint, "csr": csr}
    text = JOIN.format(name=options.name, key=key, request=request, fingerprint=grouped(fingerprint))
    print(text, file=sys.stderr)
    _print(options, table, csr.rstrip())


def invite(options: argparse.Namespace) -> None:
    from common import pki

    folder, name, out = options.dir, options.name, options.out
    registry(folder)  # a folder of another kind is named as such
    plan = deployment.load(folder / "federation.toml")
    if out is not None and out.is_dir():
        out = out / f"{name}.kit"
    if out is not None and out.exists() and not options.renew:
        raise UserError(f"{out}: is there already: name another file with --out")
    kit = pki.issue(folder, name, _request(options.csr), plan, days=options.days, renew=options.renew, path=out)
    site = registry(folder)[name]
    table = {
        "kit": str(out or folder / "kits" / f"{name}.kit"),
        "name": name,
        "federation": kit.federation,
        "fingerprint": kit.fingerprint,
        "address": kit.address,
        "expires": kit.expires.isoformat(),
        "key_fingerprint": site.fingerprint,
        "key_inside": kit.key is not None,
    }
    said = {**table, "fingerprint": grouped(kit.fingerprint), "key_fingerprint": grouped(site.fingerprint)}
    key = (WITH_KEY if kit.key else WITHOUT_KEY).format(name=name)
    _print(options, table, INVITE.format(**{**said, "expires": when(kit.expires), "key": key}))


def withdraw(options: argparse.Namespace) -> None:
    site = revoke(options.dir, options.name)
    assert site.revoked is not None
    table = {"name": site.name, "revoked": site.revoked.isoformat(), "key_fingerprint": site.fingerprint}
    csr = " --csr FILE" if site.holder == "site" else ""
    _print(options, table, WITHDRAWN.format(name=site.name, folder=options.dir, csr=csr))


def address(text: str) -> tuple[str, int]:
    """Host and port of `name`, `name:port`, `address`, `[address]:port`."""
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:]+))(?::([0-9]{1,5}))?|(.*:.*:.*)", text)
    if not found:
        raise UsageError(f"--host {text}: write NAME or NAME:PORT, like fl.example.org:9092")
    bracketed, name, port, bare = found.groups()
    server = ServerConfig(host=(bracketed or name or bare).lower(), port=int(port) if port else ServerConfig.port)
    return server.host, server.port


def class_list(text: str) -> tuple[str, ...]:
    """The classes of a file, one in a line, or of a list with commas."""
    try:
        is_file = Path(text).is_file()
    except OSError:  # a list can be too long for a path
        is_file = False
    if is_file:
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UsageError(f"--classes {text}: is not text in UTF-8: write one class in a line") from None
        names = tuple(line.strip() for line in lines if line.strip())
    elif "," in text:
        names = tuple(name.strip() for name in text.split(","))
    else:
        raise UsageError(f"--classes {text}: there is no such file; a list needs commas, like cat,dog")
    odd = [name for name in names if not name.isprintable()]
    if len(names) < 2 or odd:
        raise UsageError(f"--classes {text}: {f'{odd[0]!r} is no name' if odd else 'there must be two or more'}")
    return ImagesConfig(classes=names).classes


def _refuse_full(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file: name a new folder")
    if (folder / "federation.toml").exists():
        raise UserError(f"{folder}: holds a federation already: go on with `fedloge invite`, or name a new folder")
    if found := sorted(path.name for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty (it has {found[0]}): name a new folder")


def _request(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise UsageError(f"--csr {path}: cannot be read ({error.strerror}): name the request of the site") from None


def _verb(verbs: Any, name: str, run: Any, about: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=about, epilog=f"example: {example}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _folder(parser: argparse.ArgumentParser, about: str = "folder of the federation") -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help=about)


def _site(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the site: a-z, 0-9, '.' and '-'")


def _print(options: argparse.Namespace, table: dict[str, Any], text: str) -> None:
    print(json.dumps(table) if options.json else text)
