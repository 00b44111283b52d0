"""The configuration: what is refused, in which words, and that what is accepted comes back unchanged."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import Config, DataConfig, RunConfig, load, parse
from common.errors import UsageError
from common.methods import METHODS


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {  # table, the key its message names, what it allows
    "unknown key": ({"train": {"learning_rate": 0.1}}, "train.learning_rate", "lr, momentum"),
    "unknown section": ({"training": {"lr": 0.1}}, "training", "train"),
    "unknown method": ({"method": {"name": "fedfoo"}}, "method.name = 'fedfoo'", "fedavg"),
    "method is no text": ({"method": {"name": ["fedavg"]}}, "method.name", "fedavg"),
    "knob of another method": ({"method": {"name": "fedavg", "psi_loss": "balanced"}}, "method.psi_loss", "probes"),
    "knob of a method without any": ({"method": {"name": "fedloge", "mu": 0.1}}, "method.mu", "psi_loss"),
    "section as value": ({"train": 3}, "train = 3", "[train]"),
    "section as list": ({"data": [1]}, "data = [1]", "[data]"),
    "method as value": ({"method": "fedavg"}, "method = 'fedavg'", "[method]"),
    "value as section": ({"name": {"x": 1}}, "name", "text"),
    "text for int": ({"seed": "1"}, "seed = '1'", "whole number"),
    "float for int": ({"train": {"epochs": 1.5}}, "train.epochs = 1.5", "whole number"),
    "bool for int": ({"train": {"batch": True}}, "train.batch = True", "whole number"),
    "bool for float": ({"train": {"lr": True}}, "train.lr = True", "a number"),
    "int for bool": ({"method": {"name": "fedavg", "probes": 1}}, "method.probes = 1", "true or false"),
    "int for text": ({"data": {"path": 3}}, "data.path = 3", "text"),
    "nan": ({"train": {"lr": math.nan}}, "train.lr = nan", "finite"),
    "infinite": ({"evaluation": {"gain": math.inf}}, "evaluation.gain = inf", "finite"),
    "no float is as large": ({"federation": {"deadline": 10**400}}, "federation.deadline", "a number"),
    "unknown choice": ({"data": {"source": "mnist"}}, "data.source = 'mnist'", "cifar10"),
    "list for a choice": ({"partition": {"kind": ["iid"]}}, "partition.kind", "dirichlet"),
    "choice of a method": ({"method": {"psi_loss": "flat"}}, "method.psi_loss = 'flat'", "balanced"),
    "sparsity": ({"frame": {"sparsity": 1.0}}, "frame.sparsity = 1.0", "[0, 1)"),
    "frame norm": ({"frame": {"norm": 0}}, "frame.norm", "above 0"),
    "frame seed": ({"frame": {"seed": -1}}, "frame.seed", "2^63"),
    "alpha": ({"partition": {"alpha": 0}}, "partition.alpha", "above 0"),
    "no clients": ({"partition": {"clients": 0}}, "partition.clients = 0", "1 or more"),
    "partition seed": ({"partition": {"seed": 2**32}}, "partition.seed", "2^32"),
    "holdout": ({"partition": {"holdout": 1.0}}, "partition.holdout", "[0, 1)"),
    "fraction above one": ({"federation": {"fraction": 1.5}}, "federation.fraction = 1.5", "(0, 1]"),
    "fraction zero": ({"federation": {"fraction": 0}}, "federation.fraction", "(0, 1]"),
    "quorum": ({"federation": {"quorum": 2}}, "federation.quorum", "(0, 1]"),
    "rounds": ({"federation": {"rounds": 0}}, "federation.rounds", "1 or more"),
    "imbalance": ({"data": {"imbalance": 0.0}}, "data.imbalance", "(0, 1]"),
    "path missing": ({"data": {"source": "cifar10"}}, "data.path", "folder or file"),
    "nothing held out": ({"evaluation": {"on": "holdout"}}, "partition.holdout", "above 0"),
    "momentum": ({"train": {"momentum": 1}}, "train.momentum", "[0, 1)"),
    "negative seed": ({"seed": -1}, "seed = -1", "0 to 2^63 - 1"),
    "name with a slash": ({"name": "a/b"}, "name", "slashes"),
    "name empty": ({"name": ""}, "name", "word"),
    "device": ({"run": {"device": "tpu"}}, "run.device = 'tpu'", "cuda:N"),
    "device number": ({"run": {"device": "cuda:x"}}, "run.device", "cuda:N"),
    "one checkpoint": ({"run": {"keep": 1}}, "run.keep", "2 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_key_with_what_is_allowed(case: str) -> None:
    table, key, allowed = REFUSED[case]
    message = refusal(parse, table)
    assert key in message
    assert allowed in message


def test_an_empty_table_is_the_default_experiment() -> None:
    assert parse({}) == Config(METHODS["fedloge"]())


def test_whole_numbers_are_numbers() -> None:
    assert parse({"train": {"lr": 1}}).train.lr == 1.0
    assert isinstance(parse({"train": {"lr": 1}}).train.lr, float)


def test_dataclasses_refuse_by_themselves_too() -> None:
    refusal(lambda: DataConfig(imbalance=2.0))
    refusal(lambda: replace(RunConfig(), threads=0))


# --- files and overrides -------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_text('seed = 5\n[train]\nlr = 0.5\n[method]\nname = "fedloge"\npsi_loss = "balanced"\n')
    return path


def test_overrides_win_and_bare_words_are_text(file: Path) -> None:
    made = load(file, ["train.lr=0.25", "model.name=cnn", 'name="my run"', "partition.clients = 7", "data.path=/a=b"])
    assert (made.seed, made.train.lr, made.model.name, made.name) == (5, 0.25, "cnn", "my run")
    assert (made.partition.clients, made.data.path) == (7, "/a=b")


def test_another_method_drops_the_knobs_of_the_file_and_takes_its_own(file: Path) -> None:
    assert load(file).method == METHODS["fedloge"](psi_loss="balanced")  # type: ignore[call-arg]
    assert load(file, ["method=fedavg"]).method == METHODS["fedavg"]()
    assert load(file, ["method=fedavg", "method.probes=true"]).method == METHODS["fedavg"](probes=True)  # type: ignore[call-arg]
    assert "method.psi_loss" in refusal(load, file, ["method.name=fedavg"])  # the section stays, so do its knobs


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.lr", "train.lr"),
        ("=3", "=3"),
        ("train.lr=fast", "train.lr = 'fast'"),
        ("train.speed=3", "train.speed"),
        ("seed.x=1", "seed is a value"),
        ("train.lr.x=1", "lr is a value"),
        ("train=1", "train = 1"),
        ("method=7", "method.name = 7"),
        ("method=[1]", "method.name = [1]"),
        ("train.lr=nan", "train.lr = nan"),
        ("partition.clients=1e3", "partition.clients = 1000.0"),
    ],
)
def test_bad_overrides_are_refused(file: Path, override: str, key: str) -> None:
    assert key in refusal(load, file, [override])


def test_a_file_that_is_no_toml_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("seed = 1\ntrain = {\n")
    message = refusal(load, path)
    assert str(path) in message
    assert "line" in message
    path.write_bytes(b"name = '\xff'\n")
    assert "not valid TOML" in refusal(load, path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "none.toml" in refusal(load, tmp_path / "none.toml")
    assert str(tmp_path) in refusal(load, tmp_path)


# --- nothing is lost on the way ------------------------------------------------------------------------------------

shares = st.floats(0.01, 0.99)
TABLES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=8),
        "seed": st.integers(0, 2**70),
        "data": st.fixed_dictionaries({}, optional={"imbalance": shares, "profile": st.sampled_from(["exp", "step"])}),
        "partition": st.fixed_dictionaries(
            {"holdout": shares}, optional={"clients": st.integers(1, 9), "alpha": st.floats(1e-3, 1e3)}
        ),
        "train": st.fixed_dictionaries({}, optional={"lr": st.one_of(st.integers(1, 9), st.floats(1e-6, 10))}),
        "federation": st.fixed_dictionaries({}, optional={"fraction": shares, "deadline": st.integers(1, 10**9)}),
        "method": st.sampled_from([{"name": name} for name in sorted(METHODS)] + [{"psi_loss": "balanced"}]),
        "run": st.fixed_dictionaries({}, optional={"device": st.sampled_from(["auto", "cpu", "cuda", "cuda:11"])}),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TABLES)
def test_a_configuration_survives_its_dictionary_json_and_the_command_line(table: dict[str, Any]) -> None:
    config = parse(table)
    as_dict = config.as_dict()
    assert parse(as_dict) == config
    assert parse(json.loads(json.dumps(as_dict))) == config
    assert as_dict["method"]["name"] == table.get("method", {}).get("name", "fedloge")


def test_every_key_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    config = parse({"seed": 9, "train": {"lr": 0.7}, "method": {"name": "fedprox", "mu": 0.5}, "name": "it's"})
    table = config.as_dict()
    overrides = [f"method={table['method'].pop('name')}"]
    for key, value in table.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        overrides += [f"{key}.{name}".rstrip(".") + f"={json.dumps(v)}" for name, v in inner]
    assert load(empty, overrides) == config
