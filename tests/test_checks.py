"""recipes/checks.py: what is judged of each fact, and that the estimates bound what is used."""

import os
from contextlib import suppress
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest

from loaders.datamodule import DataConfig, ImageNetData
from loaders.machine import UNLIMITED, Machine, Place
from loaders.topology import Topology
from loaders.validation import ValidationLoader
from recipes import checks
from recipes.checks import Finding, exit_status, load_of

MB, GB = 10**6, 10**9
MACHINE = Machine(
    memory=64 * GB,
    free=60 * GB,
    limited_by="the machine's memory",
    shm=2 * GB,
    cores=16,
    open_files=1024,
    open_files_most=4096,
)
PLACE = Place(path=Path("/scratch/x"), kind="ext4", free=100 * GB, problem="")
LOAD = load_of(DataConfig(num_workers=8), ranks=2, batch_size=256, shards=1000)


def gpus(number: int, devices: int, accelerator: str = "auto") -> Finding:
    """Devices on a machine with so many GPUs."""
    return checks.check_devices(accelerator=accelerator, devices=devices, gpus=number, cuda="12.8")


def run_folder(place: Place, present: int = 0) -> Finding:
    """Six checkpoints of 1 GB."""
    return checks.check_run(place, checkpoint=GB, copies=6, present=present)


def cache(place: Place, present: int = 0, data: int = 200 * GB) -> Finding:
    """A cache that may have 90 GB."""
    return checks.check_cache(place, limit=90 * GB, data=data, present=present)


@pytest.mark.parametrize(
    ("finding", "level", "text"),
    [
        (checks.check_memory(LOAD, MACHINE), "ok", "60.0 GB free of 64.0 GB"),
        (checks.check_memory(LOAD, replace(MACHINE, free=5 * GB)), "warning", "end what else runs"),
        (checks.check_memory(LOAD, replace(MACHINE, memory=5 * GB)), "error", "data.num_workers"),
        (checks.check_shm(MACHINE, gpus=8), "ok", "2.0 GB free"),
        (checks.check_shm(replace(MACHINE, shm=64 * MB), gpus=1), "ok", "64 MB free"),
        (checks.check_shm(replace(MACHINE, shm=64 * MB), gpus=2), "warning", "--shm-size=1g"),
        (checks.check_shm(replace(MACHINE, shm=1000), gpus=0), "error", "remove what fills it"),
        (checks.check_shm(replace(MACHINE, shm=None), gpus=0), "error", "--shm-size=1g"),
        (checks.check_files(LOAD, MACHINE), "ok", "the limit is 1024"),
        (checks.check_files(LOAD, replace(MACHINE, open_files=UNLIMITED)), "ok", "no limit"),
        (checks.check_files(LOAD, replace(MACHINE, open_files=100)), "error", "ulimit -n"),
        (
            checks.check_files(LOAD, replace(MACHINE, open_files=100, open_files_most=100)),
            "error",
            "by root: the hard limit is 100",
        ),
        (checks.check_cores(LOAD, MACHINE), "ok", "16 for 16 loader workers (2 x 8)"),
        (checks.check_cores(LOAD, replace(MACHINE, cores=7.5)), "warning", "data.num_workers=3"),
        (gpus(8, 8), "ok", "8 GPUs found, 8 asked for"),
        (gpus(4, 8), "error", "lower --devices"),
        (gpus(0, 1), "warning", "the CPU trains; see nvidia-smi"),
        (gpus(0, 1, "gpu"), "error", "0 GPUs found, 1 asked for"),
        (gpus(0, 1, "cuda"), "error", "set trainer.accelerator=cpu, or see nvidia-smi"),
        (gpus(0, 4, "tpu"), "ok", "4 of tpu, which only training can tell"),
        (gpus(0, 2, "cpu"), "ok", "2 processes on the CPU"),
        (checks.check_decoder("region x", "pillow 12"), "ok", "region x; pillow 12"),
        (checks.check_decoder("pillow 12", "pillow 12"), "warning", "libjpeg-dev"),
        (checks.check_package("wandb", there=True, needed=False), "ok", "wandb is there"),
        (checks.check_package("wandb", there=False, needed=False), "warning", "stream[wandb]"),
        (checks.check_package("matplotlib", there=False, needed=True), "error", "stream[plots]"),
        (run_folder(PLACE), "ok", "up to 6 checkpoints of 1.0 GB"),
        (run_folder(replace(PLACE, free=5 * GB)), "error", "free some space"),
        (run_folder(replace(PLACE, free=5 * GB), present=GB), "ok", "5.0 GB free"),
        (run_folder(replace(PLACE, kind="tmpfs")), "warning", "it is memory"),
        (run_folder(replace(PLACE, problem="/: Read-only")), "error", "/: Read-only; choose"),
        (cache(PLACE), "ok", "90.0 GB allowed, the data has 200.0 GB"),
        (cache(replace(PLACE, free=50 * GB)), "warning", "data.cache_gb=45"),
        (cache(replace(PLACE, free=50 * GB), present=40 * GB), "ok", "90.0 GB allowed"),
        (cache(replace(PLACE, free=50 * GB), data=GB), "ok", "the data has 1.0 GB"),
        (cache(replace(PLACE, kind="tmpfs")), "warning", "it is memory"),
        (cache(replace(PLACE, kind="fuse.gcsfuse")), "warning", "it is on the network"),
        (cache(replace(PLACE, problem="/: full")), "error", "set data.cache_dir"),
        (checks.check_clock(0.4), "ok", "0 s ahead of"),
        (checks.check_clock(-90), "warning", "90 s behind the service's; set it"),
        (checks.check_clock(901), "error", "901 s ahead of the service's; set it"),
    ],
)
def test_each_check(finding: Finding, level: str, text: str) -> None:
    """Level, value and remedy of every outcome; errors alone have an exit status."""
    assert (finding.level, finding.status) == (level, 2 if level == "error" else 0)
    assert text in finding.text


def test_the_highest_status_counts() -> None:
    """0 without errors; bad data beside wrong use is bad data."""
    found = [checks.ok("a", "x"), checks.warning("b", "x", "y")]
    assert exit_status(found) == 0
    found.append(checks.error("c", "x"))
    assert exit_status(found) == 2
    assert exit_status([*found, checks.error("d", "x", status=3), checks.ok("e", "x")]) == 3


def open_files(pid: int | str) -> list[tuple[str, os.stat_result]]:
    """What each open file of a process is."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.append((os.readlink(path), path.stat()))
    return found


def test_the_estimates_bound_what_loaders_really_have(small_shards: Path) -> None:
    """Memory for batches to the byte; open files of a worker and of training from above."""
    config = DataConfig(
        root=str(small_shards), num_workers=2, prefetch=3, train_size=48, val_resize=40, val_size=40
    )
    load = load_of(config, ranks=1, batch_size=4, shards=6)
    before = len(open_files("self"))
    data = ImageNetData(config, seed=0, batch_size=4)
    train = data.train_loader(Topology(global_batch=4))
    val = ValidationLoader(
        data.val, batch=4, resize=40, size=40, workers=config.num_workers, prefetch=3
    )
    blocks = {stat.st_ino: stat for name, stat in open_files("self") if "shardstream" in name}
    assert sum(stat.st_size for stat in blocks.values()) == load.blocks
    others = {process.pid for process in active_children()}
    streams = [iter(train), iter(val)]
    for stream in streams:
        next(stream)
    for _ in range(4):
        train.set_epoch(train.state_dict()["epoch"] + 1)
        list(train)  # all shards are open after that
    workers = {process.pid for process in active_children()} - others
    assert len(workers) == 2 * config.num_workers
    most = max(len(open_files(pid)) for pid in workers if pid)
    assert 6 < most <= checks.WORKER_FILES + 6
    a_worker = (len(open_files("self")) - before) / len(workers)
    assert 2 < a_worker <= checks.RANK_FILES_A_WORKER
