"""Every command in the README and in docs/ works: those of `fedloge` and of our modules are run as written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            lines = [re.sub(r"\s+#.*", "", line).strip() for line in block.splitlines()]
            found += [line for line in lines if line]
    return sorted(set(found))


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(".venv/bin/")])
def test_command_runs_as_written(command: str, tmp_path: Path) -> None:
    for name in ("fedloge", "benchmarks"):  # files the commands name, relative to the checkout
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = shlex.split(command.removeprefix(".venv/bin/"))
    start = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", *words]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_other_kind_of_command_hides_in_the_pages() -> None:
    assert all(c.startswith((".venv/bin/fedloge ", ".venv/bin/python -m ", "make ")) for c in commands())


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
