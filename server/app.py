"""The Flower app of the server: a run is a federation's rounds, from where its folder says they stand.

`fedloge server` starts it with the run config key `federation`, the absolute path of the folder. It holds nothing that
is not on disk after every round: whenever it dies, the next run goes on. What only the operator can mend is one line
in the log and the phase `gave-up`; whatever else fails is left to Flower, and a new run is worth a try.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import ExitCode, flwr_exit
from flwr.superlink.grid import GrpcGrid

from common import deployment
from common.errors import UserError
from server.federate import federate
from server.flower_fleet import FlowerFleet
from server.flower_link import NoLink, open_link
from server.status import Board

OVERRIDES = "overrides.json"  # in the run folder: what was set on the command line

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    try:
        serve(grid, context)
    except NoLink:
        raise
    except UserError as error:
        log.error("%s", error)
        flwr_exit(ExitCode.SERVERAPP_EXCEPTION, message=str(error))


def serve(grid: Grid, context: Context) -> None:
    """Run the federation of this run to its end."""
    folder = Path(str(context.run_config.get("federation", "")))
    if not folder.is_absolute():
        raise UserError("the run has no federation: start it with `fedloge server DIR`")
    if not isinstance(grid, GrpcGrid):
        raise UserError("this grid is not that of a SuperLink: start the run with `fedloge server DIR`")
    run = folder / "run"
    board = Board(run, run=str(context.run_id))
    try:
        plan = deployment.load(folder / "federation.toml", _overrides(run))
    except UserError as error:
        board.show(phase="gave-up", message=str(error))
        board.flush()
        raise
    torch.set_num_threads(plan.config.run.threads)
    link = open_link(folder)
    fleet = FlowerFleet(
        grid,
        plan.settings(),
        registry=lambda: {node: site.name for node, site in link.nodes().items() if site.name is not None},
        wire=plan.config.federation.wire,
        notify=lambda sites, problems: board.show(sites=sites, bad_cards=problems),
        count=lambda traffic: board.show(traffic=traffic),
    )
    try:
        federate(plan, run, fleet, board, farewell=fleet.over)
    finally:
        fleet.close()
        link.close()


def _overrides(run: Path) -> list[str]:
    try:
        found: list[str] = json.loads((run / OVERRIDES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return found
