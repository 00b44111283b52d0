"""The command knows which module has which verb, and imports no other."""

import argparse
import importlib
import subprocess
import sys

import pytest

from fedloge.main import VERBS


@pytest.mark.parametrize("module", VERBS)
def test_every_module_has_the_verbs_it_is_said_to_have(module: str) -> None:
    verbs = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(f"fedloge.{module}").add_verbs(verbs)
    assert tuple(verbs.choices) == VERBS[module]


def test_a_client_gets_to_its_server_without_waiting_for_torch() -> None:
    code = """
import sys
from fedloge import main
main._parse(["client", "north.kit", "--data", "x"])
import client.node, common.kit, fedloge.site
print(sorted({"torch", "torchvision", "sklearn"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_verb_that_is_none_is_told_all_there_are() -> None:
    done = subprocess.run([sys.executable, "-m", "fedloge", "fly"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    for verbs in VERBS.values():
        for verb in verbs:
            assert verb in done.stderr
