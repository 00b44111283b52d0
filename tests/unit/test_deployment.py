"""federation.toml: what it may say, and what of it travels to the sites."""

import json
from pathlib import Path

import pytest

from common import deployment
from common.config import RunConfig
from common.errors import UsageError, UserError

TOML = """
name = "birds"
seed = 7
[images]
classes = ["owl", "crow"]
size = 16
[server]
host = "fl.example.org"
test = "/srv/test"
[model]
name = "cnn"
weights = "/srv/backbone.safetensors"
[federation]
rounds = 3
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(TOML)
    return path


def test_the_file_and_its_overrides(written: Path) -> None:
    found = deployment.load(written, ["federation.rounds=5", "images.channels=1"])
    assert (found.config.federation.rounds, found.images.channels, found.server.port) == (5, 1, 9092)
    assert found.task.classes == ("owl", "crow")
    assert found.task.side == 16


def test_sites_get_what_they_train_by_and_nothing_of_the_machine(written: Path) -> None:
    sent = deployment.load(written).settings()
    assert "/srv" not in sent
    assert "fl.example.org" not in sent
    own = RunConfig(device="cpu", threads=2)
    got = deployment.from_settings(sent, own)
    assert got.task.classes == ("owl", "crow")
    assert got.config.run == own
    assert got.config.seed == 7
    assert got.config.model.weights == ""
    assert got.settings() == sent


def test_the_port_that_sites_dial_and_the_one_it_listens_on() -> None:
    assert deployment.ServerConfig(port=443).door == 443
    assert deployment.ServerConfig(port=443, listen=9092).door == 9092


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[data]\nsource = 'digits'", "data are at the sites"),
        ("[partition]\nclients = 3", "data are at the sites"),
        ("[server]\nport = 0", "server.port = 0"),
        ("[server]\nport = '9092'", "server.port = '9092' has the wrong type"),
        ("[server]\nlisten = 70000", "server.listen = 70000"),
        ("[server]\nhost = 'https://x'", "server.host"),
        ("[images]\nclasses = ['a', 'a']", "every class name once"),
        ("[images]\nclasses = 'a'", "use a list"),
        ("[images]\nclasses = [1, 2]", "images.classes = 1 has the wrong type"),
        ("[images]\nchannels = 2", "images.channels = 2"),
        ("[images]\nmean = [0.5]", "one number for every channel"),
        ("[images]\nstd = [0.1, 0, 1]", "numbers above 0"),
        ("[images]\ncolour = true", "unknown key images.colour"),
        ("[evaluation]\non = 'holdout'", "holdout"),
        ("[federation]\nmin_clients = 0", "federation.min_clients = 0"),
        ("[federation]\nfold = 'size'", "arrival, name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(line)
    with pytest.raises(UsageError, match=says.replace("[", r"\[")) as error:
        deployment.load(path)
    assert "\n" not in str(error.value)


def test_a_federation_without_classes_has_no_task(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text("")
    with pytest.raises(UserError, match=r"images\.classes"):
        _ = deployment.load(path).task


@pytest.mark.parametrize(
    "text",
    ["", "[]", "nonsense", "[" * 100_000, '{"data": {}}', '{"run": {}}', '{"train": {"lr": "fast"}}', '{"speed": 1}'],
)
def test_settings_that_are_not_ours_are_one_line(text: str) -> None:
    with pytest.raises(UserError) as error:
        deployment.from_settings(text, RunConfig())
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_a_newer_servers_key_is_named(written: Path) -> None:
    table = json.loads(deployment.load(written).settings())
    table["train"]["warmup"] = 3
    with pytest.raises(UserError, match=r"unknown key train\.warmup.*another version"):
        deployment.from_settings(json.dumps(table), RunConfig())
