"""A resident client and Flower's own node in one federation: both are sites like any other."""

import re
from collections.abc import Iterator

import pytest

from common import parts
from tests.network.study import Study
from tests.network.superlink import until

RESIDENT, STOCK = "north", "south"
pytestmark = pytest.mark.timeout(900)  # the stock node starts a Python process that imports torch for every message


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """One that has come to its end by itself."""
    settings = {"federation.rounds": 2, "federation.min_clients": 2, "federation.quorum": 1.0, "evaluation.every": 1}
    with Study(tmp_path_factory.mktemp("mixed") / "place", settings, (RESIDENT, STOCK)) as made:
        children = {"server": made.serve("--json")}
        until((made.run / "link.json").exists, "the server to be open")  # before that the stock one fails
        children |= {RESIDENT: made.join(RESIDENT), STOCK: made.join(STOCK, "--supernode")}
        for name, child in children.items():
            made.finish(child, name, 600.0)
        assert made.alive() == []
        yield made


def test_both_are_in_every_round(study: Study) -> None:
    assert [(event["round"], event["sites"], event["refused"]) for event in study.events()] == [
        (number, [RESIDENT, STOCK], {}) for number in (1, 2)
    ]
    for event in study.events():
        (personal, *_) = event["evaluation"]["personal"].values()
        assert sorted(personal["per_site"]) == [RESIDENT, STOCK]
    assert study.status()["phase"] == "finished"


@pytest.mark.parametrize("name", [RESIDENT, STOCK])
def test_each_keeps_what_is_its_own_and_hears_of_the_end(study: Study, name: str) -> None:
    state = study.state(name)
    tensors, _ = parts.read(state / "models" / "personal.safetensors")
    assert tensors
    assert sorted(path.name for path in state.glob("store/*/round-*")) == [
        "round-000001.safetensors", "round-000002.safetensors",
    ]  # fmt: skip
    said = study.said(name)
    assert "the federation is over" in said
    assert f"personal model: {state}/models/personal.safetensors" in said
    assert "round 2  loss " in said
    assert "Traceback" not in said


def test_they_are_of_two_kinds(study: Study) -> None:
    assert not (study.state(RESIDENT) / "supernode.log").exists()
    sent = re.findall(r"Sending: (\S+) message", (study.state(STOCK) / "supernode.log").read_text())
    assert sent[0] == "query.card"
    assert [kind for kind in sent if kind != "query.card"][:3] == ["train", "train", "evaluate"]
