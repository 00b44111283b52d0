"""`fedloge demo`: a whole federation on this machine, as it would run on five: a server and four sites, each a process
of its own, over gRPC and TLS, with keys, on bundled data.

It calls what the operator and the sites would call. Whatever happens to it, even SIGKILL, nothing it started is left.
"""

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import config
from common.config import Config
from common.errors import UserError
from fedloge import provision, report, shares
from fedloge.table import aligned, percent
from server import guard

DEMO = Path(__file__).parent / "demo.toml"
PARTS = ("federation", "data", "sites", "logs", "report.html")  # of the demo's folder: all of it is made anew
FAREWELL = 60.0  # seconds the sites have to end after the server has
END = 15.0  # seconds until a process that was told to end is gone
TICK = 0.2
TEXT = """
{sites} sites and a server, {rounds} rounds over gRPC with TLS, {seconds:.0f} s. Share of right answers in percent:

{table}

generic    one model for everybody: on a test set with as many images of every digit, and on what each site sees
personal   one model per site, which never left it: on what that site sees

report     {report}
generic    {folder}/federation/run/models/generic.safetensors
personal   {folder}/sites/NAME/models/personal.safetensors

Every site has few of the digits, and of some very few. A problem this small shows how things work, not which method
is better: benchmarks/RESULTS.md is for that."""


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "demo", help="a whole federation on this machine", epilog="example: fedloge demo --out /tmp/fedloge-demo"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="its folder, made anew (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of demo.toml")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    experiment = config.load(DEMO, options.set)
    began = time.monotonic()
    folder = _anew(options.out.resolve())
    names = provide(experiment, folder)
    _federate(folder, names)
    page = report.write(folder / "federation" / "run", folder / "report.html")
    result = json.loads((folder / "federation" / "run" / "metrics.json").read_text(encoding="utf-8"))
    seconds = time.monotonic() - began
    generic, local, personal = (next(iter(result[kind].values())) for kind in ("generic", "generic_local", "personal"))
    if options.json:
        figures = {
            "rounds": result["rounds"],
            "sites": len(names),
            "transport": "grpc+tls",
            "generic_accuracy": generic["top1"],
            "generic_local_accuracy": local["top1"],
            "personal_accuracy": personal["top1"],
            "seconds": round(seconds, 1),
            "report": str(page),
        }
        print(json.dumps(figures))
        return
    rows = [
        ("", "generic", "personal"),
        ("common test set", percent(generic["top1"]), ""),
        *((name, percent(local["per_site"][name]), percent(personal["per_site"][name])) for name in names),
        ("mean over sites", percent(local["top1"]), percent(personal["top1"])),
    ]
    about = {"sites": len(names), "rounds": result["rounds"], "seconds": seconds, "report": page, "folder": folder}
    print(TEXT.format(table=aligned(rows), **about))


def _anew(folder: Path) -> Path:
    """An empty folder, or that of an earlier demo without what it left."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is not a folder: name another one with --out")
    others = {path.name for path in folder.iterdir()} - set(PARTS) if folder.exists() else set()
    if others:
        raise UserError(f"{folder}: holds {min(others)}, which is not of a demo: name another folder with --out")
    for name in PARTS[:-1]:
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def provide(experiment: Config, folder: Path, host: str = "localhost", port: int = 0) -> list[str]:
    """Every site's data, and what `fedloge init` and `fedloge invite` would make; gives the names of the sites."""
    from common import deployment, pki

    names, images = shares.write(experiment, folder / "data")
    table = experiment.as_dict()
    for key in ("data", "partition", "name"):
        del table[key]
    settings: dict[str, Any] = {"seed": table.pop("seed"), "method.name": table["method"].pop("name")}
    settings |= {f"{section}.{key}": value for section, keys in table.items() for key, value in keys.items()}
    settings |= {f"images.{key}": value for key, value in vars(images).items()}
    settings |= {
        "server.bind": "127.0.0.1" if host == "localhost" else "0.0.0.0",
        "server.test": str(folder / "data" / "test.npz"),
        "federation.min_clients": len(names),  # all of them in every round, folded by name: the same bits every time
        "federation.quorum": 1.0,
        "federation.fold": "name",
    }
    place = folder / "federation"
    provision.create(place, experiment.name, host, port or _free_port(), settings)
    plan = deployment.load(place / "federation.toml")
    for name in names:
        pki.issue(place, name, None, plan)
    return names


def _federate(folder: Path, names: list[str]) -> None:
    """Run the server and the sites to their end."""
    logs, place = folder / "logs", folder / "federation"
    logs.mkdir()
    with _started(logs / "server.log", "server", place, "--json") as server, _sites(folder, names) as sites:
        said = guard.Lines(_pipe(server))
        while server.poll() is None:
            _show(said)
            for name, site in sites.items():
                if site.poll() not in (None, 0):
                    raise UserError(f"{name} ended: {_last_line(logs / f'{name}.log')}")
            time.sleep(TICK)
        _show(said)
        if server.returncode:
            raise UserError(f"the server ended: {_last_line(logs / 'server.log')}")
        until = time.monotonic() + FAREWELL
        while any(site.poll() is None for site in sites.values()) and time.monotonic() < until:
            time.sleep(TICK)


@contextmanager
def _sites(folder: Path, names: list[str]) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    sites: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in names:
            data, test = folder / "data" / f"{name}.npz", folder / "data" / f"{name}-test.npz"
            sites[name] = _start(
                folder / "logs" / f"{name}.log",
                "client", folder / "federation" / "kits" / f"{name}.kit",
                "--data", data, "--test", test, "--state", folder / "sites" / name, "--threads", "1",
            )  # fmt: skip
        yield sites
    finally:
        for site in sites.values():
            _end(site)


@contextmanager
def _started(log: Path, *arguments: object) -> Iterator["subprocess.Popen[bytes]"]:
    child = _start(log, *arguments)
    try:
        yield child
    finally:
        _end(child)


def _start(log: Path, *arguments: object) -> "subprocess.Popen[bytes]":
    """`fedloge ARGUMENTS` under a guard, which ends with us."""
    command = [sys.executable, "-I", guard.__file__, log, sys.executable, "-m", "fedloge", *arguments]
    return subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )


def _end(child: "subprocess.Popen[bytes]") -> None:
    assert child.stdin is not None
    child.stdin.close()  # the guard ends what it runs
    try:
        child.wait(END)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _pipe(child: "subprocess.Popen[bytes]") -> int:
    assert child.stdout is not None
    return child.stdout.fileno()


def _show(said: guard.Lines) -> None:
    for line in said.new():
        if not line.startswith("{"):  # the result, which is in metrics.json as well
            print(line, file=sys.stderr, flush=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return re.sub(r"^\S+ \S+ (fedloge: )?", "", lines[-1]) if lines else f"it said nothing; see {log}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
