"""Sites of a federation as resident nodes in one process, real but for their training, which takes no time.

python -m benchmarks.overhead.site DATA KIT...
"""

import logging
import os
import sys
import threading
from pathlib import Path
from unittest import mock

import torch

from client import app as site_app
from client.node import Node
from common.kit import Kit, open_kit
from common.methods.method import Method, Site
from common.net import Net, roles

STEP = 0.01

Settings = dict[str, bool | int | float | str]


def change(name: str) -> float:
    """By how much the site called `site-NUMBER` changes every value in a round."""
    return STEP * (1 + int(name.rpartition("-")[2]))


@torch.no_grad()
def perturb(net: Net, method: Method, site: Site) -> dict[str, float]:
    """Takes the place of training."""
    shared, _, _ = roles(method, net)
    for part, values in net.parts().items():
        for t in values.values() if part in shared else ():
            t.add_(change(site.name))
    return {}


def main(data: str, *kits: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
    torch.set_num_threads(1)
    sites = []
    for path in map(Path, kits):
        config: Settings = {"kit": str(path), "data": data, "state": str(path.with_suffix("")), "device": "cpu"}
        site_app.opened(config)
        sites.append((open_kit(path), config))
    threads = [threading.Thread(target=serve, args=site) for site in sites]
    with mock.patch("client.participant.train", perturb):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def serve(kit: Kit, config: Settings) -> None:
    """Until the federation is over. Should one site fail, so do all of this process."""
    try:
        Node(kit, Path(str(config["state"])), site_app.app, config, lambda text: print(kit.name, text)).run()
    except BaseException:
        logging.exception("%s failed", kit.name)
        os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
