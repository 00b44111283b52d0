"""Whole simulations on the bundled digits: what they leave behind, and that stopping them anywhere changes nothing."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.train import Diverged
from common import model_file, parts
from common.config import Config, parse
from common.errors import UserError
from common.parts import digest
from fedloge.simulate import Progress, simulate
from server import checkpoint, run_folder

ROOT = Path(__file__).parents[2]
BLOCKED = ("flwr", "grpc", "google", "cryptography", "pyarrow", "pandas", "matplotlib", "rich", "typer", "click")
SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "data": {"source": "digits", "largest": 40, "imbalance": 0.2},
    "partition": {"clients": 4, "alpha": 1.0},
    "model": {"name": "mlp", "width": 16},
    "frame": {"norm": 1.0, "sparsity": 0.3},
    "train": {"epochs": 1, "batch": 16, "lr": 0.1},
    "federation": {"rounds": 3},
    "evaluation": {"every": 1, "last": 2},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The promise of equal bits is one for one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(method: str = "fedloge", **sections: dict[str, Any]) -> Config:
    table = {**SMALL, "method": {"name": method}}
    return parse({**table, **{key: {**table.get(key, {}), **more} for key, more in sections.items()}})


def quiet(progress: Progress) -> None:
    del progress


def events(folder: Path) -> list[dict[str, Any]]:
    """All a run wrote down of its rounds, but not how long they took."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def remains(folder: Path) -> dict[str, Any]:
    """Everything a finished run is, down to the last bit; only times and the machine are left out."""
    found: dict[str, Any] = {"events": events(folder)}
    for path in sorted(folder.rglob("[!.]*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            tensors, about = parts.read(path)
            found[name] = (digest(tensors), about)
        elif path.suffix == ".json" and name != "environment.json":
            found[name] = path.read_text(encoding="utf-8")
    return found


class Crash(Exception):
    """Stands for a process that ends."""


def crash_at(round: int) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.round == round:
            raise Crash

    return progress


@contextmanager
def crash_before_checkpoint(round: int) -> Iterator[None]:
    """What is inside runs until the event of `round` is written, and not a step further."""
    save = checkpoint.save

    def failing(folder: Path, found: checkpoint.Checkpoint, *rest: Any, **more: Any) -> Path:
        if found.state.round == round:
            raise Crash
        return save(folder, found, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", failing)
        with pytest.raises(Crash):
            yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Path]:
    """The folder of an uninterrupted run, made once for every configuration."""
    made: dict[str, Path] = {}

    def run(config: Config) -> Path:
        key = json.dumps(config.as_dict())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            simulate(config, made[key], quiet)
        return made[key]

    return run


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_a_run_leaves_its_question_its_story_and_its_models(tmp_path: Path) -> None:
    config = small(evaluation={"every": 2})
    seen: list[Progress] = []
    result = simulate(config, tmp_path, seen.append)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(result))
    assert json.loads((tmp_path / "config.json").read_text()) == config.as_dict()
    (environment,) = json.loads((tmp_path / "environment.json").read_text())
    assert {"python", "torch", "processor", "code"} <= environment.keys()
    assert [event["round"] for event in events(tmp_path)] == [1, 2, 3]
    assert [event["sites"] for event in events(tmp_path)] == [[f"site-00{k}" for k in range(4)]] * 3
    assert ["evaluation" in event for event in events(tmp_path)] == [False, True, True]
    assert [(now.round, now.rounds, now.evaluation is None) for now in seen] == [(n, 3, n == 1) for n in (1, 2, 3)]
    stored = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors"))
    assert [name for name in stored if name.startswith("models/")] == [
        "models/generic.safetensors",
        *(f"models/personal/site-00{k}.safetensors" for k in range(4)),
    ]
    assert "checkpoints/round-000003.safetensors" in stored
    assert "sites/site-002/round-000003.safetensors" in stored


def test_the_result_names_every_figure(whole: Callable[[Config], Path]) -> None:
    result = json.loads((whole(small()) / "metrics.json").read_text())
    assert list(result) == [
        "name", "method", "seed", "rounds", "judged_on", "mean_of_rounds", "generic", "generic_local", "personal",
        "never_trained", "groups", "evaluations", "loss",
    ]  # fmt: skip
    assert result["mean_of_rounds"] == [2, 3]
    assert result["never_trained"] == []
    assert list(result["generic"]) == ["psi realigned", "psi", "frame"]
    assert list(result["personal"]) == ["phi+psi_k", "psi_k+psi", "phi", "psi", "frame"]
    generic, personal = result["generic"]["psi"], result["personal"]["phi"]
    assert {"top1", "balanced", "macro_f1", "ece", "per_class", "groups"} < generic.keys()
    assert {"top1", "balanced", "macro_f1", "ece", "sites", "groups", "per_site"} == personal.keys()
    of_rounds = [e["generic"]["psi"]["top1"] for e in result["evaluations"][-2:]]
    assert generic["top1"] == pytest.approx(sum(of_rounds) / 2)
    assert result["loss"][-1]["loss 0"] < result["loss"][0]["loss 0"]


def test_personal_files_are_whole_where_the_backbone_is_their_own(whole: Callable[[Config], Path]) -> None:
    for method, own in (("fedloge", False), ("ditto", True)):
        tensors, about = parts.read(whole(small(method)) / "models" / "personal" / "site-000.safetensors")
        assert any(name.startswith("backbone.") for name in tensors) == own
        assert (about["backbone"] == "own") == own
        assert {"head.weight", "head.bias"} <= tensors.keys()
        assert json.loads(about["classes"]) == list("0123456789")


def test_sites_that_never_trained_are_named(tmp_path: Path) -> None:
    result = simulate(small(federation={"rounds": 2, "fraction": 0.3}), tmp_path, quiet)
    trained = [site for event in events(tmp_path) for site in event["sites"]]
    assert len(trained) == 2
    assert result["never_trained"] == [name for k in range(4) if (name := f"site-00{k}") not in trained]


def test_with_batchnorm_at_the_sites_there_is_no_generic_model(tmp_path: Path) -> None:
    config = small(model={"name": "cnn", "norm": "local"}, federation={"rounds": 1})
    result = simulate(config, tmp_path, quiet)
    assert result["generic"] == {}
    assert "phi" in result["personal"]
    assert not (tmp_path / "models" / "generic.safetensors").exists()
    tensors, about = parts.read(tmp_path / "models" / "personal" / "site-001.safetensors")
    assert about["backbone"] == "own"
    assert any("running_mean" in name for name in tensors)
    state = checkpoint.latest(tmp_path / "checkpoints")
    assert state is not None
    assert not any("running_mean" in name for group in state.state.parts.values() for name in group)


def test_a_model_without_batchnorm_cannot_keep_it_at_the_sites(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.norm"):
        simulate(small(model={"norm": "local"}), tmp_path, quiet)


def test_training_that_diverges_is_said_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="site-000: training diverged"):
        simulate(small(train={"lr": 1e30}), tmp_path, quiet)
    assert list(tmp_path.rglob("*.safetensors")) == []


# --- stopped and started again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedloge", "ditto"])
@pytest.mark.parametrize("round", [1, 2, 3])
def test_a_crash_after_any_checkpoint_changes_nothing(
    whole: Callable[[Config], Path], tmp_path: Path, method: str, round: int
) -> None:
    with pytest.raises(Crash):
        simulate(small(method), tmp_path, crash_at(round))
    assert not (tmp_path / "metrics.json").exists()
    simulate(small(method), tmp_path, quiet)
    assert remains(tmp_path) == remains(whole(small(method)))


@pytest.mark.parametrize("method", ["fedloge", "ditto"])
@pytest.mark.parametrize("round", [1, 2, 3])
def test_a_crash_between_event_and_checkpoint_changes_nothing(
    whole: Callable[[Config], Path], tmp_path: Path, method: str, round: int
) -> None:
    """The worst moment: sites and events are a round ahead of the server."""
    with crash_before_checkpoint(round):
        simulate(small(method), tmp_path, quiet)
    assert len(events(tmp_path)) == round
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"round": ')  # and a line that was cut short
    simulate(small(method), tmp_path, quiet)
    assert remains(tmp_path) == remains(whole(small(method)))


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [halved, emptied, flipped])
def test_damaged_checkpoints_are_passed_over_and_said(
    whole: Callable[[Config], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    """With one site a round: the one that trained first in a lost round has not trained until it does so again."""
    config = small(federation={"rounds": 4, "fraction": 0.3})
    with pytest.raises(Crash):
        simulate(config, tmp_path, crash_at(3))
    lost = [tmp_path / "checkpoints" / f"round-00000{n}.safetensors" for n in (2, 3)]
    for path in lost:
        damage(path)
    with caplog.at_level(logging.INFO):
        simulate(config, tmp_path, quiet)
    assert all(f"{path}: is damaged" in caplog.text for path in lost)
    assert "the checkpoint before it is tried" in caplog.text
    assert "going on after round 1" in caplog.text
    assert remains(tmp_path) == remains(whole(config))


@pytest.mark.parametrize("many", [2, 3])
def test_the_oldest_checkpoint_kept_still_finds_the_local_parts_of_the_sites(
    whole: Callable[[Config], Path], tmp_path: Path, many: int
) -> None:
    """Sites a round ahead, and the newest checkpoints damaged, or all of them: then a person must decide."""
    config = small(federation={"rounds": 5})
    with crash_before_checkpoint(5):
        simulate(config, tmp_path, quiet)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.stem for path in kept] == ["round-000002", "round-000003", "round-000004"]
    for path in kept[-many:]:
        halved(path)
    if many == len(kept):
        with pytest.raises(UserError, match="no checkpoint is whole"):
            simulate(config, tmp_path, quiet)
        return
    simulate(config, tmp_path, quiet)
    assert remains(tmp_path) == remains(whole(config))


# --- the same folder, asked for something else -----------------------------------------------------------------------


def test_another_experiment_in_the_same_folder_is_refused_by_key(whole: Callable[[Config], Path]) -> None:
    folder = whole(small())
    before = remains(folder)
    for other, key in (
        (small(train={"lr": 0.2}), "train.lr = 0.1, not 0.2"),
        (small("fedavg"), "method.name = 'fedloge', not 'fedavg'"),
        (parse({**small().as_dict(), "method": {"psi_loss": "balanced"}}), "method.psi_loss = 'plain', not 'balanced'"),
        (small(federation={"rounds": 2}), "holds 3 rounds, more than federation.rounds = 2"),
    ):
        with pytest.raises(UserError) as caught:
            simulate(other, folder, quiet)
        assert key in str(caught.value)
        assert "\n" not in str(caught.value)
    assert remains(folder) == before


def test_a_run_of_a_version_whose_method_had_other_parts_is_refused(tmp_path: Path) -> None:
    first, more = (small(federation={"rounds": n}) for n in (1, 2))
    simulate(first, tmp_path, quiet)
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None
    renamed = {part.replace("frame", "simplex"): t for part, t in found.state.parts.items()}
    checkpoint.save(tmp_path / "checkpoints", replace(found, state=replace(found.state, parts=renamed)), keep=1)
    with pytest.raises(UserError, match="was begun by a version of fedloge whose method fedloge has other parts here"):
        simulate(more, tmp_path, quiet)


def test_more_rounds_make_the_run_it_would_have_been(whole: Callable[[Config], Path], tmp_path: Path) -> None:
    """Its former last round, judged only because it was the last, does not stay in the result."""
    evaluation = {"every": 2, "last": 2}
    first, more = (small(federation={"rounds": n}, evaluation=evaluation) for n in (3, 5))
    assert simulate(first, tmp_path, quiet)["mean_of_rounds"] == [2, 3]
    assert simulate(more, tmp_path, quiet)["mean_of_rounds"] == [4, 5]
    ours, theirs = remains(tmp_path), remains(whole(more))
    for name in ("metrics.json", "config.json", "models/generic.safetensors", "models/personal/site-003.safetensors"):
        assert ours[name] == theirs[name]


def test_a_finished_run_is_not_run_again(whole: Callable[[Config], Path]) -> None:
    folder = whole(small())
    before = remains(folder)
    seen: list[Progress] = []
    simulate(small(), folder, seen.append)
    assert seen == []
    assert remains(folder) == before


def test_a_key_that_is_newer_than_the_run_had_its_default() -> None:
    before, now = small().as_dict(), small().as_dict()
    del before["evaluation"]["start"]
    run_folder.same_experiment(before, now, Path("run"))
    with pytest.raises(UserError, match=r"evaluation\.start = 1, not 2"):
        run_folder.same_experiment(before, small(evaluation={"start": 2}).as_dict(), Path("run"))
    with pytest.raises(UserError, match=r"train\.gone = 7, not None"):
        run_folder.same_experiment({**now, "train": {**now["train"], "gone": 7}}, now, Path("run"))


# --- real processes --------------------------------------------------------------------------------------------------

LONG = {"federation": {"rounds": 40}, "data": {"largest": 0, "imbalance": 1.0}, "train": {"batch": 8},
        "evaluation": {"every": 4}}  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Children get no Flower and nothing else an experiment has no need of."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        hidden = name.partition('.')[0] in {BLOCKED!r}\n"
        "        return None if hidden else self.finder.find_spec(name, path, target)\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.finder, name)\n"
        "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
    )
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    sets = [f"{section}.{key}={json.dumps(v)}" for section, values in LONG.items() for key, v in values.items()]
    lines = [f"{key} = {json.dumps(value)}" for key, value in SMALL.items() if not isinstance(value, dict)]
    for section, values in SMALL.items():
        if isinstance(values, dict):
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    file = tmp_path / "experiment.toml"
    file.write_text("\n".join(lines))
    flags = [word for override in sets for word in ("--set", override)]
    return [sys.executable, "-m", "fedloge", "simulate", str(file), "--out", str(tmp_path / "run"), *flags]


def stopped_in_round_two(command: list[str], environment: dict[str, str], how: int) -> tuple[int, str]:
    """Start the command and send it a signal once it has reported two rounds; its exit status and what it said."""
    # a test run in the background of a script ignores Ctrl-C, and would hand that down to the child
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert child.stderr is not None
    said, rounds = [], 0
    for line in child.stderr:
        said.append(line)
        rounds += bool(re.match(r"round \d+/40 ", line))
        if rounds == 2:
            child.send_signal(how)
            break
    rest = child.communicate(timeout=60)[1]
    return child.returncode, "".join(said) + rest


@pytest.mark.timeout(300)  # five processes that import torch, on a machine that may be busy
def test_killed_interrupted_and_terminated_it_goes_on_to_the_same_bits(
    whole: Callable[[Config], Path], tmp_path: Path, environment: dict[str, str], command: list[str]
) -> None:
    status, said = stopped_in_round_two(command, environment, signal.SIGKILL)
    assert status == -signal.SIGKILL, said
    for how in (signal.SIGINT, signal.SIGTERM):
        status, said = stopped_in_round_two(command, environment, how)
        assert status == 1, said
        assert "going on after round" in said
        assert said.splitlines()[-1].startswith("fedloge: stopped; ")
        assert "Traceback" not in said
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 40
    assert remains(tmp_path / "run") == remains(whole(small(**LONG)))


def test_the_blocker_of_these_processes_blocks(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import flwr"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'flwr'\n")


def test_images_of_any_number_of_channels_end_in_a_model(tmp_path: Path) -> None:
    """Multispectral ones, for example: a real federation takes none, a simulation does."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(40) % 2)
    table = {
        "data": {"source": "npz", "path": str(tmp_path / "x.npz")},
        "partition": {"clients": 2},
        "model": {"name": "mlp", "width": 8},
        "federation": {"rounds": 1},
        "method": {"name": "fedavg"},
    }
    simulate(parse(table), tmp_path / "run", lambda _: None)
    assert model_file.load(tmp_path / "run" / "models" / "generic.safetensors").images.channels == 4
