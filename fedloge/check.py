"""`fedloge check`: what would keep a site or a server from working, found out before it starts."""

import argparse
import json
from pathlib import Path

from common.errors import UsageError, UserError
from fedloge.checks.findings import Finding, Findings
from fedloge.site import DATA

EPILOG = """example: fedloge check north.kit --data /data/xrays
         fedloge check study

At a site, with its kit: the kit and its key, the server's name, port and
certificate, whether it accepts the key, the clock, the state folder, disk,
device, and the images with --data. At the server, with the folder of the
federation: settings, model and frame, authority and certificates, name and
port, test set, disk, sites and their kits.

Every line begins with what came out: PASS; FAIL, with what is wrong and how to
mend it; WARN for what stops nothing but should be known; SKIP for what could
not be looked at. It ends with 0 if nothing failed and 1 otherwise. It changes
nothing, and may be used while a client or a server is running."""
SITE_ONLY = ("data", "test", "key", "state", "device")


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "check",
        help="find out what would not work, at a site or at the server",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="KIT|DIR", help="the kit of a site, or the folder of a federation")
    parser.add_argument("--data", type=Path, metavar="PATH", help=f"the site's images: {DATA}")
    parser.add_argument("--test", type=Path, metavar="PATH", help="images to judge by, for .npz files and tables")
    parser.add_argument("--key", type=Path, metavar="FILE", help="key of the site (default: in or beside the kit)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="what the site keeps (default: NAME for NAME.kit)")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N, or cuda,cpu (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    # the client has these too, and nothing in them can be wrong
    parser.set_defaults(run=run, threads=None, share_counts=False, keep_statistics=False)


def run(options: argparse.Namespace) -> None:
    findings = Findings(_silent if options.json else _show, options.debug)
    if options.path.is_dir():
        _check_server(findings, options)
    else:
        from fedloge.checks.site import check_site

        options.device = options.device or "auto"
        check_site(findings, options)
    if options.json:
        print(json.dumps(findings.table()))
    if findings.failed:
        raise UserError(f"{findings.failed} of {len(findings.found)} checks failed: mend them and check again")


def _check_server(findings: Findings, options: argparse.Namespace) -> None:
    from fedloge.checks.server import check_server

    folder: Path = options.path
    if not (folder / "federation.toml").is_file():
        raise UsageError(f"{folder}: has no federation.toml: name the folder of `fedloge init`, or the kit of a site")
    if given := [name for name in SITE_ONLY if getattr(options, name) is not None]:
        raise UsageError(f"--{given[0]} belongs to a site: name its kit instead of {folder}")
    check_server(findings, folder)


def _show(finding: Finding) -> None:
    print(finding, flush=True)


def _silent(finding: Finding) -> None:
    del finding
