"""What a message says beside its tensors. It comes from the network: ValueError, one printable line, for what is not as
it should be. What is taken is gone from the fields; what nobody takes is not expected."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from common.messages import Judgement
from common.packed import check_name, shown

METRICS = 100  # nothing honest comes near this and the next one
JUDGED = 2**16  # characters
T = TypeVar("T")


def take(about: dict[str, Any], name: str, kind: type[T]) -> T:
    value = about.pop(name, None)
    if type(value) is not kind:  # not isinstance: True is no number
        raise ValueError(f"{name} is not of type {kind.__name__}")
    return value


def text(about: dict[str, Any], name: str, most: int) -> str:
    found = take(about, name, str)
    if len(found) > most:
        raise ValueError(f"{name} is longer than {most} characters")
    return found


def line(about: dict[str, Any], name: str) -> str:
    """A name or a digest."""
    found = take(about, name, str)
    check_name(found)
    return found


def metrics(about: dict[str, Any]) -> dict[str, float]:
    names = [name for name in about if name.startswith("metrics/")]
    if len(names) > METRICS:
        raise ValueError(f"{len(names)} metrics are more than {METRICS}")
    for name in names:
        check_name(name)
    return {name.removeprefix("metrics/"): take(about, name, float) for name in names}


def judgement(about: dict[str, Any]) -> Judgement:
    found = text(about, "judged", JUDGED)
    try:
        judged = json.loads(found)
    except (ValueError, RecursionError):
        raise ValueError("judged is not valid JSON") from None
    tables = [table for predictors in _table(judged).values() for table in _table(predictors).values()]
    for value in (value for table in tables for value in _table(table).values()):
        if not (value is None or (type(value) in (int, float) and abs(value) < 2**53)):  # NaN is below nothing
            raise ValueError("judged holds something other than numbers")
    return cast(Judgement, judged)


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("judged is not three tables deep")
    for name in value:
        check_name(name)
    return value


def end(*left: Mapping[str, object]) -> None:
    """Nobody has asked for what was not taken."""
    for name in (name for group in left for name in group):
        raise ValueError(f"{shown(name)} is not expected")
