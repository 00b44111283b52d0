"""A site in a process of its own, to be killed by tests: `python -m tests.network.site_process KIT FOLDER [FAULT]`.

Its app echoes what it gets. A message that says `wait` is never answered; one that says `fail` raises. FAULT is where
the process kills itself while it replies, `clock` for one that is ten minutes ahead, `heart` for a heartbeat that
breaks, or `held` for one that has no fault but waits for a line of its input before it does anything.
"""

import json
import logging
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.grpc_rere_client import node_auth_client_interceptor
from flwr.clientapp import ClientApp
from flwr.supercore.date import now

from client import membership
from client.fleet_api import FleetApi, Unreachable
from client.node import Node
from tests.network.superlink import SiteKit

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    wish = message.content["wish"]
    if wish["do"] == "wait":
        Path(str(context.node_config["mark"])).touch()
        threading.Event().wait()
    if wish["do"] == "fail":
        raise RuntimeError(f"no such file:\n{context.node_config['mark']} or /data/patients/7.png")
    context.state["seen"] = ConfigRecord(
        {"messages": context.state["seen"]["messages"] + 1 if "seen" in context.state else 1}
    )
    said = ConfigRecord({"pid": os.getpid(), "messages": context.state["seen"]["messages"]})
    return Message(RecordDict({"arrays": message.content["arrays"], "said": said}), reply_to=message)


@app.query("over")
def over(message: Message, context: Context) -> Message:
    del context
    return Message(RecordDict({"said": ConfigRecord({"over": True})}), reply_to=message)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def break_(fault: str) -> None:
    """Make the process die, or its clock wrong, at a certain point."""
    announce, upload, pull = FleetApi.announce, FleetApi.upload, FleetApi.pull
    lost: list[Any] = []

    def announced(api: FleetApi, reply: Any) -> Any:
        if fault == "before the announcement":
            die()
        announce(api, reply)
        die()

    def uploaded(api: FleetApi, run_id: int, lacking: set[str], content: Any, _: Any = ()) -> None:
        upload(api, run_id, {max(lacking)}, content)
        die()

    def pulled(api: FleetApi) -> Any:
        if (order := pull(api)) is None or lost:
            return order
        lost.append(order)
        raise Unreachable("the answer was lost")

    if fault == "in the upload":
        FleetApi.upload = uploaded  # type: ignore[method-assign]
    elif fault == "a lost answer":
        FleetApi.pull = pulled  # type: ignore[method-assign]
    elif fault == "clock":
        node_auth_client_interceptor.now = lambda: now() + timedelta(minutes=10)
    elif fault == "heart":
        membership.BEAT = 0.1
        FleetApi.heartbeat = lambda api: api.nonsense  # type: ignore[method-assign,attr-defined]
    elif fault not in ("", "held"):
        FleetApi.announce = announced  # type: ignore[method-assign]


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(kit: str, folder: str, fault: str = "") -> None:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(message)s")
    signal.signal(signal.SIGTERM, interrupt)
    if fault == "held":
        print("held", flush=True)
        if not sys.stdin.readline():
            return
    break_(fault)
    table = json.loads(kit)
    made = SiteKit(**{**table, "ca": table["ca"].encode(), "key": table["key"].encode()})
    Node(made, Path(folder), app, {"mark": f"{folder}/mark"}, patience=15).run()  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
