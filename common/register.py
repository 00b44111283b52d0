"""The register of a federation's sites: one file `DIR/sites/NAME.json` ties a name to a public key.

It is what the server goes by: a site is the name of the key it signs with, so none can take another's name, and a key
that was revoked does not come back. Damage is named, not guessed over.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from common import files
from common.errors import UserError

TIMES = ("issued", "expires", "revoked")


@dataclass(frozen=True)
class Site:
    name: str
    public_key: bytes  # PEM SubjectPublicKeyInfo
    fingerprint: str  # SHA-256 of the public key
    holder: Literal["site", "operator"]  # who made the key
    issued: datetime
    expires: datetime
    revoked: datetime | None = None

    @property
    def objection(self) -> str:
        """Why the site may not take part now; empty if it may."""
        if self.revoked:
            return f"revoked on {when(self.revoked)}"
        return f"expired on {when(self.expires)}" if now() > self.expires else ""


def registry(folder: Path) -> dict[str, Site]:
    """All sites ever invited, by name; UserError names a file that is damaged."""
    if not (folder / "pki" / "ca.crt").is_file():
        raise UserError(f"{folder}: is not the folder of a federation: make one with `fedloge init`")
    return {path.stem: _read(path) for path in sorted((folder / "sites").glob("*.json"))}


def enter(folder: Path, site: Site) -> None:
    """Add the site, or replace its entry, unless its key is another's or was revoked."""
    check(folder, site)
    _write(folder, site)


def check(folder: Path, site: Site) -> None:
    for other in registry(folder).values():
        if other.public_key == site.public_key and other.name != site.name:
            raise UserError(f"this key is that of site {other.name}: every site makes its own")
        if other.public_key == site.public_key and other.revoked:
            raise UserError(
                f"the key of {site.name} was revoked: have the site delete {site.name}.key, "
                "run `fedloge join` again and send the new request (--csr)"
            )


def revoke(folder: Path, name: str) -> Site:
    """The site may take part no more; what it gave to earlier rounds stays in the models."""
    site = registry(folder).get(name)
    if site is None:
        raise UserError(f"there is no site {name} to revoke: {named(folder)}")
    if site.revoked is None:
        site = replace(site, revoked=now())
        _write(folder, site)
    return site


def named(folder: Path) -> str:
    """Which sites there are, in words."""
    names = ", ".join(registry(folder))
    return f"there are {names}" if names else "there is none yet, see `fedloge invite`"


def key_fingerprint(public_key: bytes) -> str:
    """SHA-256 of the public key, given as PEM SubjectPublicKeyInfo."""
    return hashlib.sha256(base64.b64decode(b"".join(public_key.splitlines()[1:-1]), validate=True)).hexdigest()


def grouped(fingerprint: str) -> str:
    """As people read it to each other."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))


def when(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _write(folder: Path, site: Site) -> None:
    table: dict[str, Any] = {**vars(site), "public_key": site.public_key.decode()}
    for name in TIMES:
        table[name] = table[name] and table[name].isoformat()
    files.write(folder / "sites" / f"{site.name}.json", json.dumps(table, indent=1) + "\n")


def _read(path: Path) -> Site:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        whole = table.keys() == {f.name for f in fields(Site)} and table["holder"] in ("site", "operator")
        times = {name: table[name] and datetime.fromisoformat(table[name]) for name in TIMES}
        site = Site(**{**table, **times, "public_key": table["public_key"].encode()})
        whole &= site.name == path.stem and key_fingerprint(site.public_key) == site.fingerprint
        whole &= all(site_time.tzinfo == UTC for site_time in (site.issued, site.expires, site.revoked or site.issued))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path}: is damaged: restore it from a backup, or delete it and invite the site anew")
    return site
