"""A federation behind a real nginx, with the sample configurations of docker/nginx: passing TLS on, and ending it.

The samples are used as they are but for names, ports and places. A model of 2 MB crosses in one piece, which nginx
refuses by itself.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import pki
from fedloge import main
from tests.network.study import ROOT, Study
from tests.network.superlink import free_port, until

SAMPLES = ROOT / "docker" / "nginx"
SITES = ("north", "south")
SETTINGS = {
    "model.width": 700, "federation.rounds": 2, "federation.min_clients": 2, "federation.quorum": 1.0,
    "evaluation.every": 1,
}  # fmt: skip
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
pytestmark = pytest.mark.timeout(600)


def configured(sample: Path, study: Study, place: Path) -> Path:
    """The sample for this study: a proxy at the port its sites know, to the one its server listens on."""
    text = sample.read_text(encoding="utf-8")
    for old, new in (
        (r"\blisten 9092\b", f"listen 127.0.0.1:{study.port}"),
        (r"192\.0\.2\.10:9092", f"127.0.0.1:{study.plan.server.door}"),
        (r"fl\.example\.org", "localhost"),
        (r"/etc/nginx/fedloge/", f"{study.folder}/pki/"),
    ):
        text, many = re.subn(old, new, text)
        assert many or "terminate" not in sample.name, old
    # for those who are not root; nothing of the sample is about it
    temporary = "".join(
        f"    {kind}_temp_path {place};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (place / "nginx.conf").write_text(text.replace("http {\n", f"http {{\n{temporary}"), encoding="utf-8")
    return place / "nginx.conf"


def start(study: Study, conf: Path) -> None:
    """nginx under a guard: gone with the study, whatever happens."""
    log = conf.with_name("error.log")
    words = [NGINX, "-e", log, "-c", conf, "-g", f"pid {conf.parent}/nginx.pid; daemon off;"]
    tried = subprocess.run([str(word) for word in [*words, "-t"]], capture_output=True, text=True, check=False)
    if 'unknown directive "stream"' in tried.stderr or "ngx_stream_module.so" in tried.stderr:
        pytest.skip("nginx has no stream module here (Debian: libnginx-mod-stream)")
    assert tried.returncode == 0, tried.stderr
    child = study.start("nginx", *words)
    until(lambda: child.poll() is not None or (conf.parent / "nginx.pid").exists(), "nginx to listen")
    assert child.poll() is None, study.said("nginx") + log.read_text()


@pytest.fixture(scope="module", params=["pass", "terminate"])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """One whose sites reach the server by the proxy alone: they know its port, and the server listens on another."""
    if NGINX is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light libnginx-mod-stream)")
    place = tmp_path_factory.mktemp(request.param)
    with Study(place / "place", {**SETTINGS, "server.listen": free_port()}, SITES) as made:
        start(made, configured(SAMPLES / f"{request.param}.conf", made, place))
        made.serve("--json")
        until(made.status, "the server to know its sites")
        yield made


def checked(kit: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """What `fedloge check` finds at a site."""
    capsys.readouterr()
    code = main.run(["check", str(kit), "--json"])
    lines = json.loads(capsys.readouterr().out)["checks"]
    return code, {line["name"]: (line["result"], line["text"]) for line in lines}


def test_sites_are_known_by_their_keys(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The signatures pass, and that of a site nobody invited is refused by the server, not by the proxy."""
    kits = study.folder / "kits"
    code, lines = checked(kits / "north.kit", capsys)
    assert code == 0, lines
    assert lines["key"] == ("PASS", f"the server at localhost:{study.port} accepts the key of north")
    assert lines["clock"] == ("PASS", "agrees with the server's")
    shutil.copytree(study.folder / "pki", tmp_path / "pki")
    for name in ("sites", "kits"):
        (tmp_path / name).mkdir()
    pki.issue(tmp_path, "stranger", None, study.plan)
    code, lines = checked(tmp_path / "kits" / "stranger.kit", capsys)
    assert (code, lines["tls"][0], lines["key"][0]) == (1, "PASS", "FAIL")
    assert f"the server at localhost:{study.port} does not know the key of stranger" in lines["key"][1]


def test_a_federation_runs_to_its_end(study: Study) -> None:
    children = {name: study.join(name) for name in SITES}
    for name, child in children.items():
        study.finish(child, name, 400.0)
    until(lambda: study.status()["phase"] == "finished", "the end of the federation")
    assert [(event["round"], event["sites"], event["refused"]) for event in study.events()] == [
        (number, list(SITES), {}) for number in (1, 2)
    ]
    assert max(path.stat().st_size for path in study.run.glob("checkpoints/*.safetensors")) > 2 * 2**20
    for name in SITES:
        assert f"connected to localhost:{study.port} as {name}" in study.said(name)
        assert study.said(name).count("connected to") == 1, study.said(name)  # never lost
        assert (study.state(name) / "models" / "personal.safetensors").exists()
