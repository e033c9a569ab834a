#!/usr/bin/env python3
"""Does a loader worker grow? Prints the memory of each worker over the epochs of packed shards.

Resident is what the kernel counts for the process (RSS), the blocks that it shares with training
among it; its own is what would be free if it ended.

  python scripts/bench_memory.py data/digits-shards --epochs 20
"""

import argparse
import sys
from multiprocessing import active_children
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from loaders.augment import AugmentConfig
from loaders.loader import StreamingLoader
from loaders.order import OrderConfig
from loaders.reader import ShardReader
from loaders.topology import Topology
from sharding.console import positive
from sharding.dataset import open_splits
from sharding.errors import reports_errors


def memory(pid: int) -> tuple[float, float]:
    """Resident, and its own, in MB."""
    fields = dict.fromkeys(("Rss", "Private_Clean", "Private_Dirty"), 0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in fields:
            fields[name] = int(rest.split()[0])
    return fields["Rss"] / 1e3, (fields["Private_Clean"] + fields["Private_Dirty"]) / 1e3


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Iterate, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", metavar="SHARDS", help="a packed data set")
    parser.add_argument("--epochs", type=positive, default=50, help="default: %(default)s")
    parser.add_argument("--workers", type=positive, default=2, help="default: %(default)s")
    parser.add_argument("--batch", type=positive, default=32, help="default: %(default)s")
    options = parser.parse_args(arguments)
    splits = open_splits(options.shards)
    loader = StreamingLoader(
        ShardReader(splits.get("train") or next(iter(splits.values()))),
        order=OrderConfig(),
        augment=AugmentConfig(),
        topology=Topology(global_batch=options.batch),
        size=224,
        workers=options.workers,
    )
    print("epoch   MB resident, its own of each worker")
    shown = {1, 2, 5, *range(10, options.epochs, 10), options.epochs}
    for epoch in range(options.epochs):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
        if epoch + 1 in shown:
            workers = sorted(process.pid or 0 for process in active_children())
            cells = map(memory, workers)
            print(f"{epoch + 1:5}", *(f"{rss:9.1f} {own:7.1f}" for rss, own in cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
