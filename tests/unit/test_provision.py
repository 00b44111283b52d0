"""`fedloge init`, `join`, `invite` and `revoke` as an operator and a site meet them, and the settings file."""

import json
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from cryptography import x509

from common import config, deployment, kit, pki, register
from common.errors import UserError
from common.methods import METHODS
from fedloge import main, provision, template
from fedloge.template import METHOD

HOST = "fl.example.org"
Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command takes SIGTERM over; pytest gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def study(here: Path, capsys: Out) -> Path:
    assert call("init", "study", "--host", HOST, "--classes", "cat,dog") == 0
    capsys.readouterr()
    return here / "study"


def call(*arguments: str) -> int:
    return main.run(arguments)


def answer(capsys: Out, *arguments: str) -> dict[str, Any]:
    """The one JSON object of a verb."""
    assert call(*arguments, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def refusal(capsys: Out, code: int, *arguments: str) -> str:
    assert call(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedloge: ")
    assert err.count("\n") == 1
    return err


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- init ------------------------------------------------------------------------------------------------------------


def test_init_makes_a_federation(here: Path, capsys: Out) -> None:
    made = answer(capsys, "init", "deep/study", "--host", f"{HOST}:9300", "--classes", "cat, dog,red fox")
    folder = here / "deep" / "study"
    assert everything(folder) == [
        "federation.toml", "kits", "pki", "pki/ca.crt", "pki/ca.key", "pki/server.crt", "pki/server.key", "sites",
    ]  # fmt: skip
    assert [mode(folder / "pki" / name) for name in ("ca.key", "server.key")] == [0o600, 0o600]
    plan = deployment.load(folder / "federation.toml")
    assert (plan.config.name, plan.server.host, plan.server.port) == ("study", HOST, 9300)
    assert plan.images.classes == ("cat", "dog", "red fox")
    ca = x509.load_pem_x509_certificate((folder / "pki" / "ca.crt").read_bytes())
    assert made == {
        "folder": "deep/study", "settings": "deep/study/federation.toml", "federation": "study", "host": HOST,
        "port": 9300, "classes": 3, "fingerprint": pki.keys.fingerprint(ca),
    }  # fmt: skip
    assert pki.server_objection(folder, HOST) == ""
    assert everything(here / "deep")[0] == "study"  # and nothing beside it


def test_init_shows_the_fingerprint_in_groups_and_what_is_next(here: Path, capsys: Out) -> None:
    assert call("init", "study", "--host", HOST) == 0
    out = capsys.readouterr().out
    ca = x509.load_pem_x509_certificate((here / "study" / "pki" / "ca.crt").read_bytes())
    groups = register.grouped(pki.keys.fingerprint(ca))
    assert groups in out
    assert {len(group) for group in groups.split()} == {4}
    assert "list the classes in study/federation.toml" in out
    assert "fedloge invite study NAME" in out


def test_init_takes_a_folder_that_is_empty(here: Path, capsys: Out) -> None:
    assert answer(capsys, "init", ".", "--host", HOST, "--name", "Ärzte & Co")["federation"] == "Ärzte & Co"
    assert deployment.load(here / "federation.toml").config.name == "Ärzte & Co"
    assert everything(here)[:3] == ["federation.toml", "kits", "pki"]


def test_init_touches_nothing_that_is_there(study: Path, here: Path, capsys: Out) -> None:
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    assert "holds a federation already" in refusal(capsys, 1, "init", "study", "--host", HOST)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before
    (here / "file").write_text("")
    assert "is a file" in refusal(capsys, 1, "init", "file", "--host", HOST)
    assert "is not empty (it has file)" in refusal(capsys, 1, "init", ".", "--host", HOST)


@pytest.mark.parametrize("folder", ["study", "."])
def test_init_leaves_nothing_half(folder: str, here: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr("fedloge.provision.files.write", full)
    assert "no space left" in refusal(capsys, 1, "init", folder, "--host", HOST)
    assert everything(here) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "http://x.org"], "http"),
        (["--host", "x.org:"], "NAME:PORT"),
        (["--host", "x.org:http"], "NAME:PORT"),
        (["--host", "x.org:0"], "server.port"),
        (["--host", "x.org:70000"], "server.port"),
        (["--host", ""], "NAME:PORT"),
        (["--host", "0.0.0.0"], "no site can connect"),
        (["--host", "[::1"], "neither a host name"),
        (["--host", "a b"], "server.host"),
        (["--host=-x.org"], "neither a host name"),
        (["--host", HOST, "--classes", "none.txt"], "no such file"),
        (["--host", HOST, "--classes", "."], "no such file"),
        (["--host", HOST, "--classes", "a,b,a"], "every class name once"),
        (["--host", HOST, "--classes", "a,,b"], "not empty"),
        (["--host", HOST, "--classes", "a,b\tc"], "is no name"),
        (["--host", HOST, "--classes", "one.txt"], "two or more"),
        (["--host", HOST, "--classes", "latin.txt"], "UTF-8"),
        (["--host", HOST, "--name", ""], "--name"),
        (["--host", HOST, "--name", "a/b"], "--name"),
        (["--host", HOST, "--name", "a\nb"], "--name"),
        (["--host", HOST, "--name", "x" * 65], "--name"),
    ],
)
def test_init_refuses_what_cannot_be(arguments: list[str], said: str, here: Path, capsys: Out) -> None:
    (here / "one.txt").write_text("cat\n\n")
    (here / "latin.txt").write_bytes("Bär\nHund\n".encode("latin-1"))
    assert said in refusal(capsys, 2, "init", "study", *arguments)
    assert everything(here) == ["latin.txt", "one.txt"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x.org", ("x.org", 9092)),
        ("X.org:1", ("x.org", 1)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[fd00::7]:80", ("fd00::7", 80)),
        ("[fd00::7]", ("fd00::7", 9092)),
        ("fd00::7", ("fd00::7", 9092)),
    ],
)
def test_an_address_has_a_port_or_the_usual_one(text: str, found: tuple[str, int]) -> None:
    assert provision.address(text) == found


def test_classes_come_from_a_file_or_a_list(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffcat, tabby \n\n  red fox\r\nÄsche\n", encoding="utf-8")
    assert provision.class_list(str(path)) == ("cat, tabby", "red fox", "Äsche")
    many = tuple(f"class {number}" for number in range(3000))
    assert provision.class_list(",".join(many)) == many


# --- the settings ----------------------------------------------------------------------------------------------------

CLASSES = ('say "hi"', "back\\slash", "Äsche", "new.dotted = key", "# no comment", "日本")


GIVEN = {"name": "study", "server.host": HOST, "server.port": 9300}


def written(tmp_path: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(template.federation({**GIVEN, "images.classes": classes}), encoding="utf-8")
    return path


def test_the_settings_are_the_defaults_but_for_what_was_given(tmp_path: Path) -> None:
    plan = deployment.load(written(tmp_path))
    assert plan == deployment.Deployment(
        config.parse({"name": "study", "method": {"name": METHOD}}),
        deployment.ImagesConfig(classes=CLASSES),
        deployment.ServerConfig(host=HOST, port=9300),
    )
    many = tuple(f"class {number}" for number in range(9000))
    assert deployment.load(written(tmp_path, many)).images.classes == many


def test_the_settings_hold_every_key_there_is(tmp_path: Path) -> None:
    table = tomllib.loads(written(tmp_path).read_text(encoding="utf-8"))
    default = deployment.Deployment(config.parse({}))
    expected = {key: {*value} for key, value in default.config.as_dict().items() if isinstance(value, dict)}
    expected |= {"images": {*vars(default.images)}, "server": {*vars(default.server)}}
    del expected["data"], expected["partition"]  # the data are at the sites
    expected["evaluation"] -= {"on"}  # has one value in a federation of real sites, as has the next one
    expected["run"] -= {"lanes"}
    expected["method"] = {"name"}  # the rest belongs to one method, see the next test
    found = {key: {*value} for key, value in table.items() if isinstance(value, dict)}
    assert found == expected
    assert {key for key, value in table.items() if not isinstance(value, dict)} == {"name", "seed"}


def test_the_settings_of_the_method_are_there_to_be_taken_in(tmp_path: Path) -> None:
    path = written(tmp_path)
    text = path.read_text(encoding="utf-8")
    knobs = [f.name for f in fields(METHODS[METHOD])]
    assert knobs
    for knob in knobs:
        assert f"\n# {knob} = " in text
        path.write_text(text.replace(f"\n# {knob} = ", f"\n{knob} = "), encoding="utf-8")
        assert deployment.load(path) == deployment.load(written(tmp_path))
    path.write_text(text.replace(f'name = "{METHOD}"', 'name = "fedavg"'), encoding="utf-8")
    assert deployment.load(path).config.method.name == "fedavg"  # by changing one word


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_settings(name: str, tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    text = template.federation({"method.name": name})
    path.write_text(text, encoding="utf-8")
    assert deployment.load(path).config.method == METHODS[name]()
    assert [f.name for f in fields(METHODS[name]) if f"\n# {f.name} = " not in text] == []


def test_the_settings_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    given = {"method.name": "fedrep", "method.head_epochs": 3, "train.lr": 1e-5, "images.mean": (0.5,), "seed": 7,
             "images.channels": 1, "frame.best_effort": True}  # fmt: skip
    path.write_text(template.federation(given), encoding="utf-8")
    plan = deployment.load(path)
    assert (plan.config.method, plan.config.seed) == (METHODS["fedrep"](head_epochs=3), 7)  # type: ignore[call-arg]
    assert (plan.config.train.lr, plan.config.frame.best_effort, plan.images.mean) == (1e-5, True, (0.5,))
    path.write_text(template.federation({"evaluation.on": "holdout"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluation\.on"):  # nothing that is given is lost
        deployment.load(path)
    for key in ("train.speed", "data.path", "lr", "method.mu"):
        with pytest.raises(UserError, match=f"unknown key {key}"):
            template.federation({key: 1})


def test_every_setting_says_what_it_means(tmp_path: Path) -> None:
    lines = written(tmp_path).read_text(encoding="utf-8").splitlines()
    silent = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if line and line[0] not in "#[ ]" and " # " not in line and not above.startswith("# ")
    ]
    assert silent == []
    assert max(map(len, lines)) <= 120


def test_the_settings_are_read_from_the_code() -> None:
    @dataclass(frozen=True)
    class Fewer:
        first: int = 1  # of all

    @dataclass(frozen=True)
    class Knobs(Fewer):
        speed: float = 1e-5  # of light; "ü" before it
        kind: Literal["a", "b"] = "a"  # b: the other
        names: tuple[str, ...] = ("ü", "#")  # behind a hash
        silent: bool = False

    assert template.comments(Knobs) == {
        "first": "of all", "speed": 'of light; "ü" before it', "kind": "b: the other", "names": "behind a hash",
        "silent": "",
    }  # fmt: skip


# --- join and invite -------------------------------------------------------------------------------------------------


def test_a_key_made_at_the_site_stays_there(study: Path, here: Path, capsys: Out) -> None:
    assert call("join", "hospital-a", "--out", "site") == 0
    out, err = capsys.readouterr()
    assert out == (here / "site" / "hospital-a.csr").read_text()  # so that it can be copied, or piped
    assert "do not send it" in err
    assert everything(here / "site") == ["hospital-a.csr", "hospital-a.key"]
    assert mode(here / "site" / "hospital-a.key") == 0o600
    made = answer(capsys, "invite", "study", "hospital-a", "--csr", "site/hospital-a.csr", "--out", "site")
    assert made["kit"] == "site/hospital-a.kit"
    assert made["key_inside"] is False
    assert register.grouped(made["key_fingerprint"]) in err  # both sides are shown the same
    assert "PRIVATE" not in (here / "site" / "hospital-a.kit").read_text()
    opened = kit.open_kit(here / "site" / "hospital-a.kit")
    assert (opened.name, opened.fingerprint, opened.address) == ("hospital-a", made["fingerprint"], f"{HOST}:9092")
    assert opened.expires.isoformat() == made["expires"]
    site = register.registry(study)["hospital-a"]
    assert (site.holder, site.fingerprint, site.expires) == ("site", made["key_fingerprint"], opened.expires)


def test_join_again_keeps_the_key(here: Path, capsys: Out) -> None:
    first = answer(capsys, "join", "a")
    key = (here / "a.key").read_bytes()
    (here / "a.csr").unlink()
    second = answer(capsys, "join", "a")
    assert (here / "a.key").read_bytes() == key
    assert second["key_fingerprint"] == first["key_fingerprint"]
    assert second["csr"] == (here / "a.csr").read_text()


def test_join_does_not_build_on_a_key_that_is_none(here: Path, capsys: Out) -> None:
    (here / "a.key").write_text("x")
    assert call("join", "a") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "fedloge: a.key: is damaged or not a private key: put the right file there"
    assert everything(here) == ["a.key"]


def test_a_complete_kit_says_what_it_means(study: Path, capsys: Out) -> None:
    assert call("invite", "study", "b", "--days", "10") == 0
    out = capsys.readouterr().out
    path = study / "kits" / "b.kit"
    opened = kit.open_kit(path)
    assert mode(path) == 0o600
    assert register.registry(study)["b"].holder == "operator"
    assert register.grouped(opened.fingerprint) in out
    assert register.when(opened.expires) in out
    assert "you have held the key" in out
    assert "fedloge client b.kit" in out


@pytest.mark.usefixtures("study")
def test_a_kit_without_key_says_where_it_is_of_use(capsys: Out) -> None:
    assert call("join", "b") == 0
    assert call("invite", "study", "b", "--csr", "b.csr") == 0
    out = capsys.readouterr().out
    assert "only beside b.key" in out
    assert "you have held" not in out


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["study", "B"], "no name of a site"),
        (1, ["study", "a"], "site a is there already"),
        (1, ["study", "c", "--renew"], "no site c to renew: there are a"),
        (2, ["study", "c", "--csr", "none.csr"], "none.csr: cannot be read"),
        (1, ["study", "c", "--csr", "a.csr"], "is for 'a', not for c"),
        (1, ["study", "c", "--csr", "a.key"], "a private key, not a request"),
        (1, ["study", "c", "--csr", "text"], "damaged or none"),
        (2, ["study", "c", "--days", "0"], "--days 0"),
        (2, ["study", "c", "--days", "9999999999"], "--days 9999999999"),
        (1, ["study", "c", "--out", "text"], "text: is there already"),
        (1, ["study", "c", "--out", "none/c.kit"], "cannot be written"),
        (1, ["none", "c"], "not the folder of a federation"),
        (1, ["text", "c"], "not the folder of a federation"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invite_refuses_what_cannot_be(
    code: int, arguments: list[str], said: str, study: Path, here: Path, capsys: Out
) -> None:
    assert call("join", "a") == 0
    assert call("invite", "study", "a", "--csr", "a.csr") == 0
    (here / "text").write_text("hello")
    capsys.readouterr()
    before = everything(here)
    assert said in refusal(capsys, code, "invite", *arguments)
    assert everything(here) == before
    assert list(register.registry(study)) == ["a"]


def test_nobody_is_invited_before_the_classes_are_listed(here: Path, capsys: Out) -> None:
    answer(capsys, "init", "study", "--host", HOST)
    said = refusal(capsys, 1, "invite", "study", "a")
    assert "study/federation.toml: images.classes" in said
    path = here / "study" / "federation.toml"
    path.write_text(path.read_text().replace("classes = []", 'classes = ["a", "b"]'))
    answer(capsys, "invite", "study", "a")
    path.write_text("[images")
    assert "not valid TOML" in refusal(capsys, 2, "invite", "study", "b")


def test_a_renewal_replaces_the_kit(study: Path, capsys: Out) -> None:
    first = answer(capsys, "invite", "study", "a", "--out", "a.kit")
    second = answer(capsys, "invite", "study", "a", "--out", "a.kit", "--renew", "--days", "700")
    assert second["fingerprint"] == first["fingerprint"]
    assert second["key_fingerprint"] != first["key_fingerprint"]
    assert second["expires"] > first["expires"]
    assert kit.open_kit(Path("a.kit")).expires.isoformat() == second["expires"]
    assert register.registry(study)["a"].fingerprint == second["key_fingerprint"]


def test_a_revoked_site_comes_back_with_a_new_key_only(study: Path, capsys: Out) -> None:
    answer(capsys, "join", "a")
    answer(capsys, "invite", "study", "a", "--csr", "a.csr")
    first = answer(capsys, "revoke", "study", "a")
    assert first["revoked"] == answer(capsys, "revoke", "study", "a")["revoked"]
    assert call("revoke", "study", "a") == 0
    assert "fedloge invite study a --renew --csr FILE" in capsys.readouterr().out
    assert register.registry(study)["a"].objection.startswith("revoked on ")
    assert "was revoked" in refusal(capsys, 1, "invite", "study", "a", "--renew", "--csr", "a.csr")
    Path("a.key").unlink()
    answer(capsys, "join", "a")
    answer(capsys, "invite", "study", "a", "--renew", "--csr", "a.csr")
    assert register.registry(study)["a"].objection == ""


def test_only_a_site_that_is_there_can_be_revoked(study: Path, capsys: Out) -> None:
    assert "there is none yet" in refusal(capsys, 1, "revoke", "study", "a")
    for name in ("b", "a"):
        answer(capsys, "invite", "study", name)
    assert "no site c to revoke: there are a, b" in refusal(capsys, 1, "revoke", "study", "c")
    (study / "sites" / "a.json").write_text("{")
    assert "a.json: is damaged" in refusal(capsys, 1, "revoke", "study", "b")
    assert "not the folder" in refusal(capsys, 1, "revoke", "nowhere", "b")


def test_the_command_needs_no_cryptography_until_it_is_used() -> None:
    code = "import sys; import fedloge.provision, fedloge.main; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout == "False\n"
