"""Live processes that each do their work once when told, and say how much processor time it took."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.figures import aim, spread
from common.errors import UserError

REFERENCE = "reference"
ROOT = Path(__file__).parents[2]


class Worker:
    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self._child = child

    def wait(self) -> float:
        """For its next line: seconds."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise UserError(f"a process that measures ended with {self._child.wait()}: what it said stands above")
        return float(line)

    def turn(self) -> float:
        assert self._child.stdin is not None
        print("again", file=self._child.stdin, flush=True)
        return self.wait()


def alternated(module: str, jobs: Mapping[str, Mapping[str, Any]], turns: int) -> dict[str, list[float]]:
    """Processor seconds of every turn of every job, one process at a time. `module` is a program that takes a job as
    JSON and calls `serve`."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_started(module, job)) for name, job in jobs.items()}
        for worker in workers.values():
            worker.wait()
        for _ in range(turns):
            for name, worker in workers.items():
                seconds[name].append(worker.turn())
    return seconds


@contextmanager
def _started(module: str, job: Mapping[str, Any]) -> Iterator[Worker]:
    """It ends with us, whatever becomes of us: nobody writes to it any more."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module, json.dumps(job)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            yield Worker(child)
        finally:
            child.terminate()


def environment() -> dict[str, str]:
    """One thread, this checkout, and nothing said to the C library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}


def serve(prepared: Callable[..., AbstractContextManager[Callable[[], object]]]) -> None:
    """The work of the job on the command line: once to warm up, then whenever a line comes in."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that it takes its files away
    with prepared(**json.loads(sys.argv[1])) as work:
        work()
        print(0.0, flush=True)
        for _ in sys.stdin:
            began = time.process_time()
            work()
            print(time.process_time() - began, flush=True)


def compared(seconds: Mapping[str, list[float]], images: int) -> dict[str, Any]:
    """Of every rung: seconds, images a second, and how many times quicker than the reference's turn beside it."""
    reference = seconds[REFERENCE]
    ratios = {
        name: spread([r / s for r, s in zip(reference, took, strict=True)])
        for name, took in seconds.items()
        if name != REFERENCE
    }
    return {
        "processor_seconds": {name: spread(took) for name, took in seconds.items()},
        "images_per_second": {name: round(images / statistics.median(took), 1) for name, took in seconds.items()},
        "ratios": ratios,
    }


def steady(record: Mapping[str, Any]) -> dict[str, float]:
    """The ratios of all rows that another processor has as well: bf16 is fast only where there are instructions."""
    return {
        f"{row['model']} {name}": ratio["median"]
        for row in record["rows"]
        for name, ratio in row["ratios"].items()
        if name != "bf16" or record["native_bf16"]
    }


def native_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text(encoding="utf-8")


def shown(row: Mapping[str, Any], aims: Mapping[str, float]) -> list[str]:
    lines = []
    for name, s in row["processor_seconds"].items():
        line = f"  {name:10}{row['images_per_second'][name]:9.1f} images a second   {s['median']:8.3f} s"
        if ratio := row["ratios"].get(name):
            line += f"   {ratio['median']:5.2f} x ({ratio['least']:.2f} to {ratio['most']:.2f})"
            line += f"   ({aim(ratio['median'], f'at least {aims[name]}')})" if name in aims else ""
        lines.append(line)
    return lines
