"""A ServerApp that only pretends, for tests of what starts and watches the real one.

It plays rounds by writing what the real one writes: status, events, checkpoints, result. While a file `hold` is in
the run folder it stays in its round; while `fail` is there it raises at its start.
"""

import os
from pathlib import Path

import server

PACKAGE = f"""
__path__.append({str(Path(server.__file__).parent)!r})  # all but app.py is the real one
"""
APP = """
import json
import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.status import Board

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    run = Path(str(context.run_config["federation"])) / "run"
    rounds = int(json.loads((run / "overrides.json").read_text())[0].removeprefix("federation.rounds="))
    (run / "checkpoints").mkdir(exist_ok=True)
    with (run / "starts").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    board = Board(run, run=str(context.run_id), rounds=rounds)
    print("standing in", flush=True)
    if (run / "fail").exists():
        raise RuntimeError("made to fail")
    done = len(list((run / "checkpoints").iterdir()))
    for number in range(done + 1, rounds + 1):
        board.show(phase="training", round=number, chosen=["a", "b"], waiting=["b"], generic=number / 10)
        board.flush()
        while (run / "hold").exists():
            time.sleep(0.02)
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"round": number, "sites": ["a"], "refused": {}, "missing": ["b"]}) + "\\n")
        (run / "checkpoints" / f"round-{number:06d}.safetensors").touch()
    local = {"phi": {"top1": 0.7, "per_site": {"a": 0.7}}}
    result = {"rounds": rounds, "generic": {"psi": {"top1": 0.5}}, "generic_local": local, "personal": local}
    (run / "metrics.json").write_text(json.dumps(result))
    if (run / "give-up").exists():
        board.show(phase="gave-up", message="round 2 found no quorum 3 times in a row")
        board.flush()
        raise RuntimeError("gave up")
    board.show(phase="finished", left=0.0)
    board.flush()
"""


def environment(folder: Path) -> dict[str, str]:
    """In it, Flower's `server.app:app` is the stand-in written to `folder`."""
    package = folder / "server"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "app.py").write_text(APP)
    return {**os.environ, "PYTHONPATH": str(folder)}
