"""`fedloge check` without a server to reach: every way in which a kit, a machine, data or settings can be wrong."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.node import only_one
from common import deployment, keys, pki, register
from fedloge import main
from fedloge.checks.findings import Findings
from tests.network.superlink import free_port

Out = pytest.CaptureFixture[str]
Lines = list[tuple[str, str, str]]  # name, result, text
GB = 10**9
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command takes SIGTERM over; pytest gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> Path:
    """A federation of cats, dogs and foxes with one site, and the working directory beside it."""
    monkeypatch.chdir(tmp_path)
    assert main.run(["init", "study", "--host", f"localhost:{free_port()}", "--classes", "cat,dog,fox"]) == 0
    assert main.run(["invite", "study", "north"]) == 0
    shutil.copy("study/kits/north.kit", "north.kit")
    capsys.readouterr()
    return tmp_path / "study"


Check = Callable[..., tuple[int, Lines]]


@pytest.fixture
def check(capsys: Out) -> Check:
    def checked(*words: object) -> tuple[int, Lines]:
        code = main.run(["check", *map(str, words), "--json"])
        out, err = capsys.readouterr()
        assert out.count("\n") == 1, err
        table = json.loads(out)
        assert table.keys() == {"ok", "checks"}
        lines = [(line["name"], line["result"], line["text"]) for line in table["checks"]]
        for line, (_, result, text) in zip(table["checks"], lines, strict=True):
            assert line.keys() == {"name", "result", "text"}
            assert result in ("PASS", "FAIL", "WARN", "SKIP")
            assert text
            assert "\n" not in text
        failed = sum(result == "FAIL" for _, result, _ in lines)
        assert (table["ok"], code) == (not failed, bool(failed))
        assert err == (
            f"fedloge: {failed} of {len(lines)} checks failed: mend them and check again\n" if failed else ""
        )
        return code, lines

    return checked


def found(lines: Lines, name: str, result: str) -> str:
    """The text of the one line of this name and result."""
    texts = [text for n, r, text in lines if (n, r) == (name, result)]
    assert len(texts) == 1, lines
    return texts[0]


def failures(lines: Lines) -> set[str]:
    return {name for name, result, _ in lines if result == "FAIL"}


def names(lines: Lines) -> set[str]:
    return {name for name, _, _ in lines}


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (shade, 255 - shade, 7)).save(path)


def images(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for i in range(count):
            picture(root / name / f"{i}.png", i)
    return root


def settings(study: Path, *changes: tuple[str, str]) -> None:
    path = study / "federation.toml"
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


def at(monkeypatch: pytest.MonkeyPatch, by: timedelta, *modules: str) -> None:
    for module in modules:
        monkeypatch.setattr(f"{module}.now", lambda: datetime.now(UTC).replace(microsecond=0) + by)


KIT_CLOCK = ("common.kit", "fedloge.checks.site")
SERVER_CLOCK = ("common.pki", "common.register", "fedloge.checks.server")


# --- what is printed -------------------------------------------------------------------------------------------------


def test_lines_for_people_say_first_what_came_out(study: Path, capsys: Out) -> None:
    assert main.run(["check", str(study)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "PASS  settings: study: method fedloge+, 3 classes, images of 32 pixels, 30 rounds"
    assert {line.split()[0] for line in lines} == {"PASS", "WARN", "SKIP"}
    assert err == ""
    assert main.run(["check", "none.kit"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("FAIL  kit: none.kit: cannot be read (No such file or directory): name the kit")
    assert err.endswith("checks failed: mend them and check again\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([".", "--json"], "has no federation.toml: name the folder of `fedloge init`, or the kit of a site"),
        (["study", "--data", "x"], "--data belongs to a site: name its kit instead of study"),
        (["study", "--device", "cpu"], "--device belongs to a site"),
    ],
)
def test_wrong_usage(study: Path, capsys: Out, words: list[str], said: str) -> None:
    del study
    assert main.run(["check", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_what_nobody_thought_of_is_a_finding_too_and_stops_nothing(capsys: Out) -> None:
    def broken() -> None:
        raise KeyError("x")

    findings = Findings(print, debug=False)
    assert findings.attempt("odd", broken) is None
    assert findings.attempt("next", lambda: 7) == 7
    assert findings.failed == 1
    assert capsys.readouterr().out.startswith("FAIL  odd: cannot be checked (KeyError: 'x'): ")

    def lacking() -> None:
        raise ModuleNotFoundError("No module named 'flwr'", name="flwr")

    findings.attempt("key", lacking)
    assert findings.found[-1].text == "flwr is not installed here: install fedloge again (pip install .)"

    def unreadable() -> None:
        Path("/proc/1/nothing/there").read_bytes()

    findings.attempt("file", unreadable)
    assert findings.found[-1].text == "/proc/1/nothing/there: No such file or directory: check its folder and disk"
    with pytest.raises(KeyError):
        Findings(print, debug=True).attempt("odd", broken)


# --- a site: its kit -------------------------------------------------------------------------------------------------


def test_a_kit_that_cannot_be_used_hides_nothing_else(study: Path, check: Check, tmp_path: Path) -> None:
    del study
    data = images(tmp_path / "data", cat=5, dog=5, fox=5)
    table = json.loads(Path("north.kit").read_text())
    Path("north.kit").write_text(json.dumps({**table, "port": 1}))
    code, lines = check("north.kit", "--data", data)
    assert code == 1
    assert "was changed after the operator made it" in found(lines, "kit", "FAIL")
    assert failures(lines) == {"kit"}
    assert found(lines, "state", "PASS")
    assert "the classes of the federation are in the kit" in found(lines, "data", "SKIP")
    assert found(lines, "server", "SKIP")  # a kit that was changed does not send us anywhere

    Path("north.kit").write_text(json.dumps({k: v for k, v in table.items() if k != "key"}))
    _, lines = check("north.kit", "--data", data)
    assert "has no key in it" in found(lines, "kit", "FAIL")
    assert failures(lines) == {"kit", "port"}  # the rest of the kit is good enough to look for the server
    assert found(lines, "key", "SKIP") == "not shown to the server, as the kit cannot be used"
    assert found(lines, "data", "PASS")


@pytest.mark.parametrize(
    ("by", "said"),
    [(timedelta(days=400), "expired on"), (timedelta(days=-3), "is not valid before")],
    ids=["late", "early"],
)
def test_a_kit_at_the_wrong_time(
    study: Path, check: Check, monkeypatch: pytest.MonkeyPatch, by: timedelta, said: str
) -> None:
    del study
    at(monkeypatch, by, *KIT_CLOCK)
    assert said in found(check("north.kit")[1], "kit", "FAIL")


def test_a_kit_that_ends_soon(study: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    del study
    text = found(check("north.kit")[1], "kit", "PASS")
    assert text.startswith("north in study, valid until ")
    at(monkeypatch, timedelta(days=340), *KIT_CLOCK)
    text = found(check("north.kit")[1], "kit", "WARN")
    assert re.search(r"\(2[45] days\): ask the operator for `fedloge invite DIR north --renew` in time$", text)


def test_other_kits(study: Path, check: Check, capsys: Out) -> None:
    del study
    assert main.run(["init", "other", "--host", "localhost", "--classes", "cat,dog,fox"]) == 0
    assert main.run(["invite", "other", "north"]) == 0
    capsys.readouterr()
    Path("other.key").write_text(keys.pem(keys.new()))
    assert "is not the key of north" in found(check("north.kit", "--key", "other.key")[1], "kit", "FAIL")
    mixed = {**json.loads(Path("north.kit").read_text())}
    mixed["certificate"] = json.loads(Path("other/kits/north.kit").read_text())["certificate"]
    Path("mixed.kit").write_text(json.dumps(mixed))
    assert "its certificate is from another federation" in found(check("mixed.kit")[1], "kit", "FAIL")
    Path("mixed.kit").write_text("PK\x03\x04")
    assert "is damaged or not a kit" in found(check("mixed.kit")[1], "kit", "FAIL")


# --- a site: its server ----------------------------------------------------------------------------------------------


def test_a_name_that_is_not_found(study: Path, check: Check) -> None:
    plan = deployment.load(study / "federation.toml", ["server.host=fl.invalid"])
    pki.issue(study, "west", None, plan)
    _, lines = check(study / "kits" / "west.kit")
    assert found(lines, "name", "FAIL").startswith("fl.invalid is not found (")
    assert found(lines, "port", "SKIP") == found(lines, "tls", "SKIP") == "not looked at, as the name comes first"
    assert found(lines, "clock", "SKIP") == "not compared with the server's, as the server is not reached"


def test_a_port_where_nobody_listens(study: Path, check: Check) -> None:
    port = deployment.load(study / "federation.toml").server.port
    _, lines = check("north.kit")
    assert found(lines, "name", "PASS").startswith("localhost is ")
    text = f"nothing listens at localhost:{port}: is the server running, and is this its port?"
    assert found(lines, "port", "FAIL") == text
    assert found(lines, "tls", "SKIP")


# --- a site: its machine ---------------------------------------------------------------------------------------------


def test_a_state_folder_that_cannot_be(study: Path, check: Check) -> None:
    del study
    Path("file").write_text("x")
    for state in ("file", "file/below"):
        text = found(check("north.kit", "--state", state)[1], "state", "FAIL")
        assert text == f"{Path('file').resolve()}: is a file, not a folder: name another folder"
    _, lines = check("north.kit", "--state", "/proc/north")  # not even root can write there
    assert found(lines, "state", "FAIL").startswith("/proc: cannot be written (")
    assert "disk" not in names(lines)
    Path("north").write_bytes(Path("north.kit").read_bytes())
    assert "has no ending such as .kit" in found(check("north")[1], "state", "FAIL")


def test_a_state_folder_that_is_in_use(study: Path, check: Check) -> None:
    del study
    Path("north").mkdir()
    Path("north.kit").rename("site.kit")
    with only_one(Path("north")):
        _, lines = check("site.kit", "--state", "north")
        assert "a client is running on it" in found(lines, "state", "WARN")
        assert found(lines, "state", "PASS").endswith("north can be written")
    with only_one(Path("north")):  # looking did not keep the lock
        pass
    assert "WARN" not in [result for name, result, _ in check("site.kit", "--state", "north")[1] if name == "state"]


def test_looking_leaves_nothing_behind(study: Path, check: Check, tmp_path: Path) -> None:
    data = images(tmp_path / "data", cat=5, dog=5)
    before = sorted(tmp_path.rglob("*"))
    check("north.kit", "--data", data)
    check(study)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("free", "result", "said"),
    [
        (GB // 10, "FAIL", "100.0 MB free on the disk of {}, and 200.0 MB are needed: make room"),
        (GB, "WARN", "1.0 GB free on the disk of {}: it may become tight, 2.0 GB are safe"),
        (9 * GB, "PASS", "9.0 GB free on the disk of {}"),
    ],
)
def test_room_at_a_site(
    study: Path, check: Check, monkeypatch: pytest.MonkeyPatch, free: int, result: str, said: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * GB, 0, free))
    assert found(check("north.kit")[1], "disk", result).startswith(said.format(study.parent))


def test_devices(study: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    del study
    assert found(check("north.kit", "--device", "cpu")[1], "device", "PASS") == f"CPU, {os.cpu_count()} cores"
    assert "--device = 'gpu' is not possible" in found(check("north.kit", "--device", "gpu")[1], "device", "FAIL")
    assert "but torch sees " in found(check("north.kit", "--device", "cuda:99")[1], "device", "FAIL")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU is used (" in found(check("north.kit")[1], "device", "WARN")


def test_a_gpu(study: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played, as the machines that run tests have none."""
    del study
    ones = torch.ones

    def on_cpu(size: int, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        return ones(size)

    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 1),
        ("get_device_name", lambda _: "H200"),
        ("mem_get_info", lambda _: (100 * GB, 140 * GB)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", on_cpu)
    assert found(check("north.kit")[1], "device", "PASS") == "cuda, H200, 100.0 of 140.0 GB free"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GB // 2, 140 * GB))
    assert "other programs use its memory" in found(check("north.kit")[1], "device", "WARN")

    def broken(*_: object, device: object) -> None:
        raise RuntimeError(f"CUDA error: no kernel image for {device}\nin detail")

    monkeypatch.setattr(torch, "ones", broken)
    text = found(check("north.kit")[1], "device", "FAIL")
    assert text == "cuda cannot be used (CUDA error: no kernel image for cuda): mend the driver, or use --device cpu"


def test_software(study: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    del study
    versions = importlib.metadata.version
    assert f"flwr {versions('flwr')}" in found(check("north.kit")[1], "software", "PASS")

    def other(name: str) -> str:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"flwr": "1.35.0", "numpy": "1.9.2", "pillow": "10"}.get(name) or versions(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    texts = [text for name, result, text in check("north.kit")[1] if (name, result) == ("software", "FAIL")]
    assert len(texts) == 3
    assert "flwr is 1.35.0, not ==1.32.1: pip install 'flwr==1.32.1'" in texts
    assert any(text.startswith("torchvision is not installed: pip install 'torchvision>=") for text in texts)
    assert any(text.startswith("numpy is 1.9.2, not >=1.26") for text in texts)


# --- a site: its data ------------------------------------------------------------------------------------------------


def test_data(study: Path, check: Check, tmp_path: Path) -> None:
    del study
    data = images(tmp_path / "data", cat=20, fox=5)
    _, lines = check("north.kit", "--data", data)
    assert found(lines, "data", "PASS") == (
        "20 images to train with, 5 to judge by, of 2 of 3 classes; fewest: fox 4, cat 16; none of dog"
    )
    assert found(lines, "training images", "PASS") == "all 20 were read"
    assert found(lines, "test images", "PASS") == "all 5 were read"
    (tmp_path / "lonely").mkdir()
    _, lines = check("north.kit", "--data", images(tmp_path / "lonely", dog=5))
    assert "images of one class alone teach little" in found(lines, "data", "WARN")


def test_images_that_cannot_be_read(study: Path, check: Check, tmp_path: Path) -> None:
    del study
    data = images(tmp_path / "data", cat=20, dog=20, fox=20)
    bad = data / "fox" / "7.png"
    bad.write_bytes(bad.read_bytes()[:40])
    _, lines = check("north.kit", "--data", data)
    (name,) = failures(lines) - {"port"}
    assert found(lines, name, "FAIL").startswith(f"{bad}: cannot be read as an image (")
    for i in range(20):
        (data / "dog" / f"{i}.png").write_text("not an image")
    _, lines = check("north.kit", "--data", data)
    text = found(lines, "training images", "FAIL")
    assert "dog" in text
    assert " such among the " in text


def test_of_many_images_some_are_read(
    study: Path, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del study
    monkeypatch.setattr("fedloge.checks.images.SAMPLE", 5)
    _, lines = check("north.kit", "--data", images(tmp_path / "data", cat=10, dog=10))
    assert found(lines, "training images", "PASS") == "4 of 16 were read"
    assert found(lines, "test images", "PASS") == "all 4 were read"


def test_data_that_are_refused(study: Path, check: Check, tmp_path: Path) -> None:
    del study
    data = images(tmp_path / "data", cat=5, wolf=5)
    text = found(check("north.kit", "--data", data)[1], "data", "FAIL")
    assert "class 'wolf' is not among the 3 known classes (cat, dog, fox): rename or remove it" in text
    assert "no such file or folder" in found(check("north.kit", "--data", "none")[1], "data", "FAIL")
    (tmp_path / "empty").mkdir()
    assert "no image in any subfolder" in found(check("north.kit", "--data", "empty")[1], "data", "FAIL")
    np.savez("some.npz", images=np.zeros((4, 8, 8), np.float32), labels=np.arange(4) % 3)
    assert "save them as uint8" in found(check("north.kit", "--data", "some.npz")[1], "data", "FAIL")


def test_arrays_are_read_as_a_whole(study: Path, check: Check) -> None:
    del study
    pixels = np.zeros((30, 8, 8), np.uint8)
    labels, classes = np.arange(30) % 3, np.array(["cat", "dog", "fox"])
    pixels[:] = np.arange(30)[:, None, None]
    np.savez("train.npz", images=pixels, labels=labels, classes=classes)
    np.savez("test.npz", images=pixels[:6], labels=labels[:6], classes=classes)
    _, lines = check("north.kit", "--data", "train.npz", "--test", "test.npz")
    assert found(lines, "data", "PASS").startswith("30 images to train with, 6 to judge by, of 3 of 3 classes")
    assert "images both for training and for testing: 6" in found(lines, "data", "WARN")
    assert "training images" not in names(lines)


def test_what_the_site_has_recorded_is_minded_and_left_alone(study: Path, check: Check, tmp_path: Path) -> None:
    del study
    data = images(tmp_path / "data", cat=5)
    Path("north").mkdir()
    record = Path("north/splits.json")
    record.write_text(json.dumps({"made": "drawn", "train": [], "test": [f"cat/{i}.png" for i in range(4)]}))
    before = record.read_bytes()
    _, lines = check("north.kit", "--data", data)
    assert any(text.startswith("1 images to train with, 4 to judge by") for _, _, text in lines)
    assert any("training images since the last start: 1 new" in text for _, result, text in lines if result == "WARN")
    assert record.read_bytes() == before
    record.write_text("{")
    assert found(check("north.kit", "--data", data)[1], "data", "FAIL").startswith(f"{record.resolve()}: is damaged")


# --- the server ------------------------------------------------------------------------------------------------------


def test_a_new_federation_is_fine(study: Path, check: Check) -> None:
    code, lines = check(study)
    assert code == 0
    assert found(lines, "model", "PASS").startswith("resnet18, 512 features, ")
    assert found(lines, "frame", "PASS") == "3 classes in 512 dimensions, 60% zeros: the exact simplex"
    assert found(lines, "sites", "PASS") == "1 can take part: north"
    assert found(lines, "kits", "PASS") == "as the settings say, for north"
    assert found(lines, "port", "PASS").endswith("on 0.0.0.0 is free")
    assert "nobody else was asked" in found(lines, "clock", "WARN")


def test_settings_that_cannot_be_read_hide_nothing_else(study: Path, check: Check) -> None:
    settings(study, ("quorum = 0.5", "quorum = 7"))
    _, lines = check(study)
    assert "federation.quorum = 7.0 is not possible" in found(lines, "settings", "FAIL")
    assert failures(lines) == {"settings"}
    assert found(lines, "port", "SKIP") == "the settings come first"
    assert found(lines, "authority", "PASS")
    assert found(lines, "sites", "PASS")
    (study / "federation.toml").write_text("[server\n")
    assert "federation.toml" in found(check(study)[1], "settings", "FAIL")


def test_a_federation_without_classes(study: Path, check: Check) -> None:
    settings(study, ('classes = ["cat", "dog", "fox"]', "classes = []"))
    assert "images.classes" in found(check(study)[1], "settings", "FAIL")


def test_a_model_and_a_frame_that_cannot_be(study: Path, check: Check) -> None:
    settings(study, ("sparsity = 0.6", "sparsity = 0.99"))
    text = found(check(study)[1], "frame", "FAIL")
    assert text.startswith("frame: the exact simplex is impossible: ") or "no free entry" in text
    settings(study, ('name = "resnet18"', 'name = "vgg"'))
    _, lines = check(study)
    assert "model.name = 'vgg'" in found(lines, "model", "FAIL")
    assert found(lines, "frame", "SKIP") == "the model comes first"


def test_many_classes_have_the_best_frame_there_is(study: Path, check: Check) -> None:
    many = json.dumps([f"c{i}" for i in range(100)])
    settings(study, ('["cat", "dog", "fox"]', many), ('name = "resnet18"', 'name = "resnet8"'))
    none = "none: no simplex of 100 classes in 64 dimensions; a head is learned instead"
    assert found(check(study)[1], "frame", "PASS") == none
    settings(study, ('name = "fedloge+"', 'name = "fedloge"'))
    _, lines = check(study)
    assert "100 classes in 64 dimensions, 60% zeros: the best that solver lse finds" in found(lines, "frame", "PASS")
    text = found(lines, "kits", "FAIL")
    assert "were changed after the kits of north were made" in text


def test_a_method_without_a_frame_needs_none(study: Path, check: Check) -> None:
    settings(study, ('name = "fedloge+"', 'name = "fedavg"'), ("sparsity = 0.6", "sparsity = 0.99"))
    code, lines = check(study)
    assert code == 0
    assert "frame" not in names(lines)


def test_keys_that_others_can_read(study: Path, check: Check) -> None:
    (study / "pki" / "ca.key").chmod(0o644)
    (study / "kits" / "north.kit").chmod(0o640)
    text = found(check(study)[1], "secrets", "FAIL")
    assert text == f"{study}/pki/ca.key, {study}/kits/north.kit: others can read this key: run chmod 600 on it"


def test_an_authority(study: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    key = study / "pki" / "ca.key"
    content = key.read_bytes()
    key.write_text(keys.pem(keys.new()))
    assert "restore both from the same backup" in found(check(study)[1], "authority", "FAIL")
    key.unlink()
    assert "sites cannot be invited" in found(check(study)[1], "authority", "WARN")
    (study / "pki" / "server.crt").write_text("x")
    text = found(check(study)[1], "certificate", "FAIL")
    assert text.startswith("it is missing, damaged or of another authority, and without the authority's key")
    key.write_bytes(content)
    key.chmod(0o600)
    assert found(check(study)[1], "certificate", "WARN").endswith("renews the server's when it starts")
    at(monkeypatch, timedelta(days=3640), *SERVER_CLOCK)
    assert "the federation ends then" in found(check(study)[1], "authority", "WARN")
    at(monkeypatch, timedelta(days=3660), *SERVER_CLOCK)
    _, lines = check(study)
    assert "its authority ended on" in found(lines, "authority", "FAIL")
    (study / "pki" / "ca.crt").write_text("x")
    assert "is damaged: restore it from a backup" in found(check(study)[1], "authority", "FAIL")


def test_a_certificate_for_another_name_and_near_its_end(
    study: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(study, ('host = "localhost"', 'host = "fl.invalid"'))
    _, lines = check(study)
    text = f"it does not cover fl.invalid: `fedloge server {study}` renews the server's when it starts"
    assert found(lines, "certificate", "WARN") == text
    assert found(lines, "name", "WARN").startswith("fl.invalid is not found from here")
    assert "were changed after the kits of north were made" in found(lines, "kits", "FAIL")
    settings(study, ('host = "fl.invalid"', 'host = "localhost"'))
    at(monkeypatch, timedelta(days=1080), *SERVER_CLOCK)
    assert found(check(study)[1], "certificate", "WARN").startswith("it ends on ")
    settings(study, ('host = "localhost"', 'host = "0.0.0.0"'))
    assert "no site can connect to this address" in found(check(study)[1], "certificate", "FAIL")


def test_names(study: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "only sites on this machine can connect" in found(check(study)[1], "name", "WARN")
    settings(study, ('host = "localhost"', 'host = "192.0.2.7"'))  # an address nobody has
    text = found(check(study)[1], "name", "WARN")
    assert text.startswith("192.0.2.7 is 192.0.2.7, no address of this machine: whatever has it must pass port ")
    monkeypatch.setattr("fedloge.checks.address._is_ours", lambda _: True)
    assert found(check(study)[1], "name", "PASS") == "192.0.2.7 is 192.0.2.7, an address of this machine"


def test_ports(study: Path, check: Check) -> None:
    port = deployment.load(study / "federation.toml").server.port
    with socket.create_server(("127.0.0.1", port)):
        text = found(check(study)[1], "port", "FAIL")
    assert text.startswith(f"port {port} is in use by ")
    assert f"(pid {os.getpid()})" in text
    settings(study, ('bind = "0.0.0.0"', 'bind = "192.0.2.7"'))
    assert "is not possible here" in found(check(study)[1], "port", "FAIL")


def test_a_test_set(study: Path, check: Check, tmp_path: Path) -> None:
    def said(place: object, name: str, result: str) -> str:
        plan = study / "federation.toml"
        before = plan.read_text()
        settings(study, ('test = ""', f'test = "{place}"'))
        try:
            return found(check(study)[1], name, result)
        finally:
            plan.write_text(before)

    assert "server.test names none" in found(check(study)[1], "test set", "SKIP")
    good = images(tmp_path / "good", cat=3, dog=4)
    assert said(good, "test set", "PASS") == "7 images of 2 of 3 classes; fewest: cat 3, dog 4; none of fox"
    assert said(good, "test images", "PASS") == "all 7 were read"
    assert "no such file or folder" in said(tmp_path / "none", "test set", "FAIL")
    assert "class 'wolf' is not among" in said(images(tmp_path / "bad", wolf=3), "test set", "FAIL")
    (good / "cat" / "0.png").write_text("x")
    assert "cannot be read as an image" in said(good, "test images", "FAIL")
    np.savez("grey.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.arange(6) % 3,
             classes=np.array(["cat", "dog", "fox"]))  # fmt: skip
    grey = said(tmp_path / "grey.npz", "test images", "FAIL")
    assert grey.endswith("grey.npz: its images have 1 channel(s), those of this federation 3: save them so")


def test_a_folder_that_cannot_be_written_and_a_full_disk(
    study: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    (study / "run").write_text("x")
    assert found(check(study)[1], "folder", "FAIL") == f"{study}/run: is a file, not a folder: name another folder"
    (study / "run").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GB, 0, 100 * 10**6))
    text = found(check(study)[1], "disk", "FAIL")
    assert text.startswith(f"100.0 MB free on the disk of {study}, and 323.6 MB are needed: make room")


def test_sites(study: Path, check: Check, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    settings(study, ("min_clients = 1", "min_clients = 2"))
    text = found(check(study)[1], "sites", "FAIL")
    assert text.startswith("1 can take part and a round needs 2 (federation.min_clients): invite others")
    assert main.run(["invite", str(study), "south", "--days", "20"]) == 0
    capsys.readouterr()
    _, lines = check(study)
    assert found(lines, "sites", "WARN").startswith("south: its kit ends on ")
    assert found(lines, "sites", "PASS") == "2 can take part: north, south"
    register.revoke(study, "north")
    _, lines = check(study)
    assert found(lines, "sites", "FAIL").startswith("1 can take part")
    assert any(text.startswith("north: revoked on ") for _, result, text in lines if result == "WARN")
    assert found(lines, "kits", "PASS") == "as the settings say, for south"  # a revoked one is of no interest
    at(monkeypatch, timedelta(days=21), *SERVER_CLOCK)
    _, lines = check(study)
    assert any(text.startswith("south: expired on ") for _, result, text in lines if result == "WARN")
    (study / "sites" / "south.json").write_text("{")
    assert "south.json: is damaged" in found(check(study)[1], "sites", "FAIL")


def test_kits_that_were_replaced_do_not_count(study: Path, check: Check, capsys: Out) -> None:
    port = deployment.load(study / "federation.toml").server.port
    settings(study, (f"port = {port}", f"port = {free_port()}"))
    assert "the kits of north" in found(check(study)[1], "kits", "FAIL")
    assert main.run(["invite", str(study), "north", "--renew", "--days", "200", "--out", "new.kit"]) == 0
    capsys.readouterr()
    code, lines = check(study)
    assert code == 0
    assert "kits" not in names(lines)


def test_a_folder_that_is_no_federation_any_more(study: Path, check: Check) -> None:
    shutil.rmtree(study / "pki")
    _, lines = check(study)
    assert failures(lines) == {"certificate", "sites", "kits"}
    assert "is not the folder of a federation" in found(lines, "sites", "FAIL")
    assert any(line[0] == "authority" for line in lines)
