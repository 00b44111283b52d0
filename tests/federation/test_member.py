"""Sites as they are in a real federation, but with calls in place of messages: the same bits as the simulation, also
with a new process for every order, and never a word to the server about what lies where."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.member import Member, Told
from client.refusal import Refusal, cause
from common import model_file, parts
from common.config import Config, parse
from common.deployment import Deployment, ImagesConfig
from common.errors import UserError
from common.images import PixelImages
from common.messages import Judgement, Order, Reply
from common.methods import METHODS
from common.methods.method import ServerState
from common.net import build
from common.packed import fixed_digest
from common.parts import Tensors
from common.wire import decode_order, encode_order
from fedloge import shares
from fedloge.federation import assemble
from fedloge.simulate import simulate
from server import checkpoint, rounds
from server.fleet import LocalFleet

ROUNDS = 3
SITES = ("site-000", "site-001", "site-002")


def experiment(method: str = "fedloge", **sections: dict[str, Any]) -> Config:
    table: dict[str, Any] = {
        "seed": 4,
        "method": {"name": method},
        "data": {"largest": 40, "imbalance": 0.2, "augment": "crop"},
        "partition": {"clients": len(SITES), "alpha": 0.5},
        "model": {"name": "mlp", "width": 16},
        "frame": {"norm": 1.0, "sparsity": 0.3},
        "train": {"epochs": 1, "batch": 16, "lr": 0.1},
        "federation": {"rounds": ROUNDS, "fold": "name", "quorum": 1.0},
        "evaluation": {"every": 1, "last": 1},
    }
    return parse({**table, **{key: {**table.get(key, {}), **more} for key, more in sections.items()}})


@dataclass(frozen=True)
class Paper:
    """What of a kit a member looks at."""

    name: str
    classes: tuple[str, ...] = tuple("0123456789")
    fingerprint: str = "ab" * 32


@dataclass
class Real:
    """A federation of members on the shares of an experiment."""

    config: Config
    images: ImagesConfig
    folder: Path
    once: bool = False  # a new member for every order, as where a process is started for every message
    made: dict[str, Member] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    judged: dict[int, dict[str, Judgement]] = field(default_factory=dict)  # after which round -> by whom
    sent: int = 0  # times that fixed parts travelled

    @property
    def deployment(self) -> Deployment:
        return Deployment(self.config, self.images)

    def member(self, name: str) -> Member:
        if name not in self.made or self.once:
            self.made[name] = Member(
                Paper(name),
                self.folder / f"{name}.npz",
                self.folder / "states" / name,
                test=self.folder / f"{name}-test.npz",
                device="cpu",
                notify=self.told.append,
            )
        return self.made[name]

    def ask(self, name: str, order: Order, settings: str = "") -> Reply:
        member, digest = self.member(name), fixed_digest(order.fixed)
        with_fixed = digest != member.holds
        self.sent += with_fixed
        if not with_fixed:
            order = replace(order, fixed={})
        return member.answer(order, settings or self.deployment.settings(), digest)

    def fleet(self) -> LocalFleet:
        def handler(name: str) -> Callable[[Order], Reply]:
            return lambda order: self.ask(name, order)

        return LocalFleet({name: handler(name) for name in SITES})

    def start(self) -> ServerState:
        task = self.deployment.task
        return self.config.method.init(build(self.config.method, task), task)

    def run(self, state: ServerState) -> ServerState:
        """The rounds after `state`, and the end."""
        method, policy = self.config.method, self.config.federation

        def after(report: rounds.RoundReport) -> None:
            self.judged[report.round - 1] = report.judged

        def complete(state: ServerState) -> ServerState:
            if not method.surveyed(task):
                return state
            return rounds.survey(self.fleet(), method, task, state, net, policy, hooks)

        task = self.deployment.task
        hooks = rounds.Hooks(after=after, complete=complete, judge=lambda _: True)
        net = build(method, task)
        state = rounds.run(self.fleet(), method, state, net, policy, self.config.seed, hooks)
        self.judged[state.round] = rounds.final_judgement(self.fleet(), method, state, policy, hooks).judged
        return state


def flat(groups: dict[str, Tensors]) -> Tensors:
    return {f"{part}/{name}": t for part, group in groups.items() for name, t in group.items()}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Config, Path, dict[str, Any]]]:
    """A finished simulation of a method, run once."""
    done: dict[str, tuple[Config, Path, dict[str, Any]]] = {}

    def run(method: str) -> tuple[Config, Path, dict[str, Any]]:
        if method not in done:
            folder = tmp_path_factory.mktemp(method)
            config = experiment(method)
            done[method] = config, folder, simulate(config, folder, lambda _: None)
        return done[method]

    return run


def real(config: Config, folder: Path, once: bool = False) -> Real:
    names, images = shares.write(config, folder)
    assert tuple(names) == SITES
    return Real(config, images, folder, once)


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("once", [False, True], ids=["resident", "a process a message"])
@pytest.mark.parametrize("method", ["fedloge", "ditto"])
def test_members_give_the_bits_of_the_simulation(
    tmp_path: Path, simulated: Callable[[str], tuple[Config, Path, dict[str, Any]]], method: str, once: bool
) -> None:
    config, folder, result = simulated(method)
    federation = real(config, tmp_path, once)

    state = federation.run(federation.start())

    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert parts.digest(flat(state.parts)) == parts.digest(flat(found.state.parts))
    for evaluation in result["evaluations"]:
        judged = federation.judged[evaluation["round"]]
        assert sorted(judged) == list(SITES)
        for ours, theirs in (("generic", "generic_local"), ("personal", "personal")):
            for predictor, values in evaluation[theirs].items():
                for name, top1 in values["per_site"].items():
                    assert judged[name][ours][predictor]["top1"] == top1
    for name in SITES:
        mine, about = parts.read(federation.member(name).model)
        theirs, noted = parts.read(folder / "models" / "personal" / f"{name}.safetensors")
        assert theirs.keys() <= mine.keys()
        assert all(torch.equal(mine[key], t) for key, t in theirs.items())
        assert about == {**noted, "backbone": "own"}
        assert any(key.startswith("backbone.") for key in mine)


@pytest.mark.parametrize("method", ["fedavg-ft", "local", "fedetf", "creff"])
def test_every_kind_of_method_runs_at_members(tmp_path: Path, method: str) -> None:
    """Nothing local and a tuned copy, nothing shared, a projection, statistics."""
    config = experiment(method, federation={"rounds": 2})
    federation = real(config, tmp_path / "real")
    state = federation.run(federation.start())
    simulate(config, tmp_path / "simulated", lambda _: None)
    found = checkpoint.latest(tmp_path / "simulated" / "checkpoints")
    assert found is not None
    assert parts.digest(flat(state.parts)) == parts.digest(flat(found.state.parts))
    assert all(federation.member(name).model.exists() for name in SITES)


def test_a_server_that_goes_back_gets_the_same_bits_again(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path)
    first = federation.start()
    end = federation.run(first)
    federation.made.clear()
    again = federation.run(first)
    assert parts.digest(flat(again.parts)) == parts.digest(flat(end.parts))


def test_a_round_that_did_not_count_leaves_no_trace(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path)
    state = federation.start()
    order = Order(1, "m", *split(federation, state), judge=False)
    first = parts.snapshot(flat(federation.ask(SITES[0], order).shared))
    second = parts.snapshot(flat(federation.ask(SITES[0], replace(order, judge=True)).shared))
    assert parts.digest(first) == parts.digest(second)


def test_a_site_that_was_away_goes_on_from_its_own_newest_parts(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path)
    shared, fixed = split(federation, federation.start())
    federation.ask(SITES[0], Order(1, "m", shared, fixed))
    store = federation.folder / "states" / SITES[0] / "store" / ("fedloge-" + "ab" * 8)
    kept, _ = parts.read(store / "round-000001.safetensors")
    federation.ask(SITES[0], Order(3, "m", shared, fixed, train=False))
    assert parts.digest(parts.read(store / "round-000001.safetensors")[0]) == parts.digest(kept)
    federation.ask(SITES[0], Order(7, "m", shared, fixed))
    assert sorted(path.name for path in store.iterdir()) == ["round-000001.safetensors", "round-000007.safetensors"]


def split(federation: Real, state: ServerState) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    method = federation.config.method
    return (
        {part: t for part, t in state.parts.items() if part in method.shared},
        {part: t for part, t in state.parts.items() if part in method.fixed},
    )


# --- what stays at a site --------------------------------------------------------------------------------------------


def test_fixed_parts_travel_once_and_again_when_they_are_damaged(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path, once=True)
    order = Order(1, "m", *split(federation, federation.start()))
    for _ in range(3):
        federation.ask(SITES[0], order)
    assert federation.sent == 1
    kept = federation.folder / "states" / SITES[0] / "fixed.safetensors"
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    member = federation.member(SITES[0])
    assert member.holds == ""
    digest = fixed_digest(order.fixed)
    with pytest.raises(Refusal, match="fixed parts"):
        member.answer(replace(order, fixed={}), federation.deployment.settings(), digest)
    federation.ask(SITES[0], order)
    assert federation.sent == 2
    assert federation.member(SITES[0]).holds == digest


def test_a_fixed_part_that_has_changed_travels_alone(tmp_path: Path) -> None:
    """The head that is computed from class statistics, after every survey; the frame stays."""
    federation = real(replace(experiment(), method=METHODS["fedloge+"]()), tmp_path, once=True)
    state = federation.start()
    fixed = {part: state.parts[part] for part in ("frame", "statistics")}
    order = Order(1, "m", {"backbone": state.parts["backbone"]}, fixed)
    settings = federation.deployment.settings()
    federation.member(SITES[0]).answer(order, settings, fixed_digest(fixed))
    for value in (1.0, 2.0):
        changed = {name: torch.full_like(t, value) for name, t in fixed["statistics"].items()}
        now = {**fixed, "statistics": changed}
        sent = decode_order(encode_order(replace(order, fixed=now), settings, holds=federation.member(SITES[0]).holds))
        assert sent.order.fixed.keys() == {"statistics"}
        member = federation.member(SITES[0])
        member.answer(sent.order, settings, sent.fixed_digest)
        assert member.holds == fixed_digest(now)
        [net] = [member._work.participant.net] if member._work else []
        assert all(net.parts()[part][name].equal(t) for part, group in now.items() for name, t in group.items())


def test_fixed_parts_of_another_digest_are_refused(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path)
    order = Order(1, "m", *split(federation, federation.start()))
    with pytest.raises(Refusal, match="fixed parts"):
        federation.member(SITES[0]).answer(order, federation.deployment.settings(), "0" * 64)


def test_every_order_leaves_a_line_and_tells_those_who_look_on(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path)
    federation.run(federation.start())
    lines = (tmp_path / "states" / SITES[0] / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [(event["round"], event["trained"]) for event in events] == [(1, True), (2, True), (3, True), (3, False)]
    assert [event["generic"] is None for event in events] == [True, False, False, False]
    assert [event["loss"] is None for event in events] == [False, False, False, True]
    assert set(events[0]) == {"round", "trained", "loss", "generic", "personal", "examples", "losses", "seconds"}
    assert len(federation.told) == 4 * len(SITES)
    made = model_file.load(tmp_path / "states" / SITES[0] / "models" / "personal.safetensors")
    assert (made.images.size, made.round, made.site) == (8, 3, SITES[0])


def test_a_site_that_never_trained_keeps_no_personal_model(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path)
    order = Order(5, "m", *split(federation, federation.start()), train=False, judge=True)
    reply = federation.ask(SITES[0], order)
    assert (reply.round, reply.model, reply.shared) == (5, "m", {})
    assert reply.judged["generic"]["psi"].keys() == {"samples", "top1", "balanced", "macro_f1", "ece"}
    assert not federation.member(SITES[0]).model.exists()


def test_counts_are_shared_only_on_request(tmp_path: Path) -> None:
    shares.write(experiment(), tmp_path)
    place, test = tmp_path / "site-000.npz", tmp_path / "site-000-test.npz"
    member = Member(Paper("a"), place, tmp_path / "a", test=test)
    assert member.counts is None
    open_handed = Member(Paper("b"), place, tmp_path / "b", test=test, share_counts=True)
    assert open_handed.counts is not None
    assert sum(open_handed.counts) == open_handed.examples == member.examples


def test_settings_may_change_between_rounds(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path)
    order = Order(1, "m", *split(federation, federation.start()))
    slow = Deployment(experiment(train={"lr": 0.001}), federation.images).settings()
    first = parts.digest(flat(federation.ask(SITES[0], order).shared))
    other = parts.digest(flat(federation.ask(SITES[0], order, slow).shared))
    assert other != first
    assert parts.digest(flat(federation.ask(SITES[0], order).shared)) == first


def test_the_end_is_noted(tmp_path: Path) -> None:
    member = real(experiment(), tmp_path).member(SITES[0])
    assert not member.ended.exists()
    member.over()
    assert member.ended.exists()


# --- what a site tells of its troubles -------------------------------------------------------------------------------


def refused(federation: Real, order: Order, settings: str = "") -> str:
    with pytest.raises(Refusal) as found:
        federation.ask(SITES[0], order, settings)
    text = str(found.value)
    assert str(federation.folder) not in text
    assert "/" not in text
    assert "\n" not in text
    return text


def test_training_that_diverges_is_said(tmp_path: Path) -> None:
    federation = real(experiment(train={"lr": 1e30}), tmp_path)
    order = Order(1, "m", *split(federation, federation.start()))
    assert "diverged" in refused(federation, order)
    assert not list(tmp_path.glob("states/*/store/*/*"))


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    federation = real(experiment(), tmp_path)
    order = Order(1, "m", *split(federation, federation.start()))
    other = replace(federation.images, classes=tuple("9876543210"))
    assert "other classes" in refused(federation, order, Deployment(federation.config, other).settings())
    assert "settings" in refused(federation, order, "{")
    assert "settings" in refused(federation, order, '{"train": {"lr": "much"}}')
    colour = replace(federation.images, channels=3, mean=(), std=())
    assert "its data" in refused(federation, order, Deployment(federation.config, colour).settings())
    federation.ask(SITES[0], order)


def test_troubles_with_files_name_no_file_to_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    federation = real(experiment(), tmp_path)
    order = Order(1, "m", *split(federation, federation.start()))
    federation.ask(SITES[0], order)
    store = tmp_path / "states" / SITES[0] / "store"
    shutil.rmtree(store)
    store.write_text("in the way")
    with caplog.at_level(logging.ERROR):
        assert "state folder" in refused(federation, order)
    assert str(store) in caplog.text  # the site itself learns all of it


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("/state/x: cannot be written (No space left on device): check its folder and disk"), "disk is full"),
        (OSError(28, "No space left on device", "/data/x"), "disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), "GPU is full"),
        (MemoryError(), "memory is full"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "memory is full"),
        (UserError("/state/store: holds other parts"), "state folder"),
        (UserError("/data/cat/0001.jpg: cannot be read as an image"), "its data"),
        (PermissionError(13, "Permission denied", "/data/cat"), "its data"),
        (ZeroDivisionError("/data/x"), "it failed (ZeroDivisionError)"),
    ],
)
def test_a_cause_is_a_kind_of_trouble(error: Exception, said: str) -> None:
    text = cause(error, Path("/state"))
    assert said in text
    assert "/" not in text


# --- shares ----------------------------------------------------------------------------------------------------------


def test_shares_are_the_images_of_the_simulated_sites(tmp_path: Path) -> None:
    names, images = shares.write(experiment(), tmp_path)
    assert images == ImagesConfig(tuple("0123456789"), 8, 1, (0.305,), (0.376,), "crop")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{name}{kind}.npz" for name in names for kind in ("", "-test")] + ["test.npz"]
    )
    federation = assemble(experiment(), tmp_path)
    for name in names:
        for kind, source, index in (
            ("", federation.images, federation.sites[name].train_index),
            ("-test", federation.test, federation.judged_on[name]),
        ):
            assert isinstance(source, PixelImages)
            with np.load(tmp_path / f"{name}{kind}.npz") as file:
                assert set(file) == {"images", "labels", "classes", "mean", "std"}
                assert np.array_equal(file["images"], source.pixels[index].numpy())
                assert np.array_equal(file["labels"], source.labels[index].numpy())
                assert (tuple(file["mean"]), tuple(file["std"])) == (source.mean, source.std)


def test_images_that_stay_on_disk_cannot_be_shared_out(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (80, 80), (i * 40, 0, 0)).save(tmp_path / "data" / name / f"{i}.png")
    config = experiment(
        data={
            "source": "folder",
            "path": str(tmp_path / "data"),
            "augment": "resized-crop",
            "largest": 0,
            "imbalance": 1.0,
        },
        partition={"clients": 2, "kind": "iid"},
    )
    with pytest.raises(UserError, match="stay on disk"):
        shares.write(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
