"""Flower's own FedAvg on arrays of the shapes in `arrays.json`; writes the seconds of every round."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = {key: str(value) for key, value in context.run_config.items()}
    sites = int(config["sites"])
    rng = np.random.default_rng(0)
    shapes = json.loads((Path(config["federation"]) / "arrays.json").read_text(encoding="utf-8"))
    arrays = {name: Array(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    last = time.monotonic()

    def note(round: int, arrays: ArrayRecord) -> None:
        """Flower calls it before the first round and after each."""
        nonlocal last
        del arrays
        now = time.monotonic()
        if round:
            with Path(config["out"]).open("a", encoding="utf-8") as out:
                out.write(json.dumps({"round": round, "seconds": now - last, "sites": sites}) + "\n")
        last = time.monotonic()

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.start(grid, ArrayRecord(arrays), int(config["rounds"]), timeout=600, evaluate_fn=note)
