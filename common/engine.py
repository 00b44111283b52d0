"""Recorded steps: on a GPU one step of a phase is captured as a CUDA graph and replayed for every batch of every site.

A step of a small net is two hundred kernels of some microseconds each, and starting them one by one takes longer than
running them. A replay starts them all at once and needs nothing from the host: images come a chunk at a time, and a
cursor on the device says which rows of the chunk are the next batch. What a step reads and writes keeps its place:
the net's tensors, momentum, the chunk, and what the phase gives. On a CPU steps are taken one by one (common/sgd.py).
Both are the same operations in the same order on the same values.

Several nets may train at once, each in a thread and on a stream of its own (fedloge/lanes.py).
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from common.images import PixelImages
from common.methods.method import Phase, Site
from common.net import Net
from common.parts import Tensors, snapshot
from common.sgd import Batch, Step, fit

log = logging.getLogger(__name__)

Body = Callable[[], None]
Record = Callable[[Body, list[Tensor]], Body]  # a step, and all that it changes -> the same step, recorded
WARM = 3  # steps before a capture: libraries choose their algorithms and get their workspaces in the first ones
KEPT = 4  # programs a net keeps: phases of a method, and what its losses were last


def run_phase(net: Net, phase: Phase, site: Site, number: int) -> float:
    """Train the parts the phase lists; everything else is frozen, statistics included. Returns the mean loss of its
    last epoch."""
    net.train_only(phase.train)
    if site.device.type != "cuda":
        return _one_by_one(net, phase, site, number)
    engine = net.engine
    if not isinstance(engine, Engine):
        engine = net.engine = Engine(site)
    return engine.run(net, phase, site, number)


def _one_by_one(net: Net, phase: Phase, site: Site, number: int) -> float:
    step = _step(net, phase, site, phase.given)
    return fit(step, (site.batches(number, epoch) for epoch in range(phase.epochs)))


def _step(net: Net, phase: Phase, site: Site, given: Tensors) -> Step:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return phase.loss(net, x, y, given)

    groups = [list(net[part].parameters()) for part in phase.train]
    return Step(groups, loss, site.task.config.train, site.device)


class Engine:
    """What a net on a GPU has for its training: a stream and its recorded steps."""

    def __init__(self, site: Site) -> None:
        self._stream = torch.cuda.Stream(site.device)  # type: ignore[no-untyped-call]
        self._record = Recorder()
        self._programs: dict[Hashable, Program] = {}

    def run(self, net: Net, phase: Phase, site: Site, number: int) -> float:
        # in the calling thread: otherwise the backward passes of all lanes would take turns in one thread of torch's
        with torch.autograd.set_multithreading_enabled(False), self._aside(site.device):
            images = site.images
            if net.draws or not isinstance(images, PixelImages):
                return _one_by_one(net, phase, site, number)
            given = tuple((name, t.shape, t.dtype) for name, t in phase.given.items())
            key = (phase.train, phase.loss, given, images.side, images.channels, site.task.config.train)
            program = self._programs.pop(key, None) or Program(net, phase, site, images, self._record)
            self._programs[key] = program  # the newest is last
            while len(self._programs) > KEPT:
                del self._programs[next(iter(self._programs))]
            return program.run(phase, site, images, number)

    @contextmanager
    def _aside(self, device: torch.device) -> Iterator[None]:
        """On a stream of its own, as the default one cannot be captured; a lane is on such a stream already."""
        here = torch.cuda.current_stream(device)
        if here != torch.cuda.default_stream(device):
            yield
            return
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)


class Program:
    """The steps of one phase on one net, for any site.

    A batch of another size than the others, the last of a pass, is recorded for itself the first time there is one:
    to pad it would corrupt the statistics of BatchNorm.
    """

    def __init__(self, net: Net, phase: Phase, site: Site, images: PixelImages, record: Record) -> None:
        device, self._batch = site.device, site.task.config.train.batch
        self._given = snapshot(phase.given)
        self._step = _step(net, phase, site, self._given)
        self._record = record
        self._recorded: dict[int, Body] = {}
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        self._span = torch.arange(self._batch, device=device)
        self._x = torch.empty(0, images.side, images.side, images.channels, device=device)
        self._y = torch.empty(0, dtype=torch.int64, device=device)
        self._state = [*net.parameters(), *net.buffers(), *self._step.state, self._cursor]

    def run(self, phase: Phase, site: Site, images: PixelImages, number: int) -> float:
        """The phase for one site: what `common.sgd.fit` does with its batches."""
        for name, t in phase.given.items():
            self._given[name].copy_(t)
        self._make_room(min(len(site.train), images.room(self._batch, site.device)))
        self._step.restart()
        seen = 0
        for epoch in range(phase.epochs):
            seen = self._pass(site.chunks(number, epoch))
        return self._step.mean(seen)

    def _pass(self, chunks: Iterable[Batch]) -> int:
        self._step.begin_pass()
        seen = 0
        for x, y in chunks:
            self._x[: len(x)].copy_(x.permute(0, 2, 3, 1))  # rows as they are in channels_last memory
            self._y[: len(y)].copy_(y)
            self._cursor.zero_()
            for start in range(0, len(y), self._batch):
                self._taking(min(self._batch, len(y) - start))()
            seen += len(y)
        return seen

    def _make_room(self, images: int) -> None:
        """For the largest site so far: what is recorded knows the places of a smaller chunk."""
        if images > len(self._x):
            room = 1 << (images - 1).bit_length()
            self._x, self._y = self._x.new_empty(room, *self._x.shape[1:]), self._y.new_empty(room)
            self._recorded.clear()

    def _taking(self, n: int) -> Body:
        if n not in self._recorded:
            self._recorded[n] = self._record(partial(self._take, n), self._state)
        return self._recorded[n]

    def _take(self, n: int) -> None:
        """One step on the next `n` images of the chunk."""
        rows = self._cursor + self._span[:n]
        x = self._x.index_select(0, rows).permute(0, 3, 1, 2)
        self._step(x, self._y.index_select(0, rows))
        self._cursor += n


class Recorder:
    """Captures steps as CUDA graphs. Those of one net share their memory, as only one of them runs at a time."""

    capturing = threading.Lock()  # one at a time in a process; replays go on meanwhile
    failed = False  # said once; from then on steps are taken one by one

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body, state: list[Tensor]) -> Body:
        if Recorder.failed:
            return body
        saved = [t.detach().clone() for t in state]
        for _ in range(WARM):
            body()
            restore(state, saved)
        torch.cuda.current_stream().synchronize()
        with Recorder.capturing:
            try:
                return self._captured(body)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                Recorder.failed = True
                reason = str(error).partition("\n")[0]
                log.warning(
                    "a training step cannot be captured as a CUDA graph (%s): steps are taken one by one", reason
                )
        restore(state, saved)
        return body

    def _captured(self, body: Body) -> Body:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            body()
        except BaseException:
            with suppress(RuntimeError):  # it is spoilt, and what spoilt it is more telling
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay


@torch.no_grad()
def restore(state: list[Tensor], saved: list[Tensor]) -> None:
    for t, value in zip(state, saved, strict=True):
        t.copy_(value)
        t.grad = None
