"""Our loader from S3 behind a slow wire: does training wait for more than the wire makes it?

A proxy before the server lets all answers together take --mb_per_s, for one node and for four (one
after the other, each with its own cache and its part of the lanes). Of each image that is delivered
after the first K batches:

    wire time     its bytes / the proxy's rate: nothing is added for what is fetched twice
    decode time   seconds that the workers spent on anything but waiting for bytes / workers
    wait          seconds that the workers waited for bytes / workers / seconds in all
"""

import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench_s3_peers import Epoch, Task, start
from scripts.bench_s3_server import Meter, tars

NODES = (1, 4)
MAY_WAIT = 0.05
"""Share of the time that workers may wait beyond what the wire makes them."""
MAY_READ = 1.05
"""Times the data set that all nodes together may read in the first epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slow:
    """An epoch through the limited wire on all nodes, one after the other, and the next one."""

    nodes: int
    epochs: list[Epoch]
    """The first one of each node."""
    workers: int
    bytes_per_s: float
    data_bytes: int
    read_bytes: int
    """From the server in the first epoch, until nothing more was asked for."""
    second_requests: int
    second_rates: list[float]

    @property
    def wire(self) -> float:
        """Seconds."""
        return sum(epoch.counters["read_bytes"] for epoch in self.epochs) / self.bytes_per_s

    @property
    def decode(self) -> float:
        """Seconds."""
        return sum(epoch.counters["decode_s"] for epoch in self.epochs) / self.workers

    @property
    def seconds(self) -> float:
        """Of all nodes, one after the other."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def wait(self) -> float:
        """Share of the time that workers wait for bytes."""
        return sum(e.counters["read_s"] for e in self.epochs) / self.workers / self.seconds

    @property
    def allowed(self) -> float:
        """What that may be."""
        return max(0.0, self.wire - self.decode) / self.seconds + MAY_WAIT

    @property
    def copies(self) -> float:
        """Bytes that all nodes read in the first epoch, in sizes of the data set."""
        return self.read_bytes / self.data_bytes


def measure_slow(nodes: int, number: int, work: Path, endpoint: str, options: Any) -> Slow:
    """One round. Raises MissingError if a process ends."""
    epochs, second_rates, second_requests, read_bytes = [], [], 0, 0
    rate = options.mb_per_s * 1e6
    for rank in range(nodes):
        meter = Meter(endpoint, bytes_per_s=rate)
        with meter:
            task = Task(
                contender="ours",
                endpoint=meter.url,
                prefix=work.name,
                folder=str(work / f"slow-{nodes}-{rank}-{number}"),
                workers=options.workers,
                batch=options.batch,
                rank=rank,
                world=nodes,
            )
            runner = start(task)
            try:
                epochs.append(Epoch(**runner.ask(0)))
                meter.settle()
                read_bytes += sum(size for _, size in meter.sent)
                before = meter.reads()
                second_rates.append(Epoch(**runner.ask(1)).rate)
                second_requests += meter.reads() - before
            finally:
                runner.close()
        shutil.rmtree(task.folder)
    data_bytes = sum(path.stat().st_size for path in tars(work))
    return Slow(
        nodes=nodes,
        epochs=epochs,
        workers=options.workers,
        bytes_per_s=rate,
        data_bytes=data_bytes,
        read_bytes=read_bytes,
        second_requests=second_requests,
        second_rates=second_rates,
    )


def slow_line(nodes: int, each: list[Slow]) -> tuple[str, dict[str, str]]:
    """What is to be said of the rounds with so many nodes, and what must hold of them."""

    def middle(values: Iterable[float]) -> float:
        return statistics.median(values)

    images = sum(epoch.images for epoch in each[0].epochs)
    wait, allowed = middle(s.wait for s in each), middle(s.allowed for s in each)
    copies = middle(s.copies for s in each)
    requests = max(s.second_requests for s in each)
    who = f"{nodes} node{'s' * (nodes > 1)}"
    line = (
        f"{who}, {each[0].bytes_per_s / 1e6:g} MB/s: {images} images after the first batches in "
        f"{middle(s.seconds for s in each):.2f} s; wire time {middle(s.wire for s in each):.2f} s, "
        f"decode time {middle(s.decode for s in each):.2f} s; workers wait {wait:.1%} of it; then "
        f"{middle(rate for s in each for rate in s.second_rates):,.0f} images/s in the second epoch"
    )

    def verdict(kept: bool, value: str) -> str:
        return f"{'kept' if kept else 'missed'} ({value})"

    return line, {
        f"{who}: wait at most max(0, wire - decode) / seconds + {MAY_WAIT:.0%} = {allowed:.1%}": (
            verdict(middle(s.wait - s.allowed for s in each) <= 0, f"{wait:.1%}")
        ),
        f"{who}: no request to the store in the second epoch": verdict(
            requests == 0, str(requests)
        ),
        f"{who}: at most {MAY_READ} x the data set read in the first epoch": verdict(
            copies <= MAY_READ, f"{copies:.3f} x"
        ),
    }
