"""PURE: is there what a run needs? Facts of machine and recipe -> findings, each with its remedy.

loaders/machine.py looks at the machine, doctor.py at a recipe.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loaders.blocks import blocks_bytes
from loaders.datamodule import DataConfig
from loaders.machine import UNLIMITED, Machine, Place
from loaders.readahead import THREADS
from loaders.reader import OPEN_SHARDS
from loaders.sizes import Sizes
from sharding.errors import EXIT_USAGE

# Measured, and rounded up: the memory of a loader worker's own, that of a training process without
# its network, and the files that each has open beside shards.
WORKER_BYTES = 50_000_000
RANK_BYTES = 1_000_000_000
WORKER_FILES = 64
RANK_FILES = 128
RANK_FILES_A_WORKER = 10

_LITTLE_SHM = 1_000_000
_NCCL_SHM = 1_000_000_000
"""What NVIDIA advises for NCCL in containers."""
_SKEW_NOTED_S = 60.0
_SKEW_REFUSED_S = 900.0
"""From here on S3 refuses requests (RequestTimeTooSkewed)."""
_MEMORY = ("tmpfs", "ramfs")
_NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "9p", "fuse.", "afs")
"""How the names of network file systems begin."""
_EXTRAS = {"matplotlib": "plots"}
"""Of ours, where they are not named like the package that they bring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    level: Literal["ok", "warning", "error"]
    """error: it would stop the run. warning: the run would be slow, or be lost some day."""
    name: str
    text: str
    """The value and, where something is wrong, what to do."""
    status: int = 0
    """The exit status of an error."""

    def __str__(self) -> str:
        return f"{self.level:9}{self.name:15}{self.text}"


def ok(name: str, text: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(level="ok", name=name, text=text)


def warning(name: str, text: str, remedy: str) -> Finding:
    """A run that would be slow, or be lost some day."""
    return Finding(level="warning", name=name, text=f"{text}; {remedy}")


def error(name: str, text: str, remedy: str = "", status: int = EXIT_USAGE) -> Finding:
    """A run that would stop."""
    text = f"{text}; {remedy}" if remedy else text
    return Finding(level="error", name=name, text=text, status=status)


def exit_status(findings: Iterable[Finding]) -> int:
    """0, or the highest status of the errors."""
    return max((finding.status for finding in findings), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a run asks of each node."""

    ranks: int
    """Training processes, one a device."""
    workers: int
    """Loader processes of each rank in training; validation has as many of its own."""
    blocks: int
    """Bytes of all memory for batches."""
    files: int
    """Open files of the process that has the most."""

    @property
    def memory(self) -> int:
        """Bytes in all, but for the network, its gradients and its activations."""
        processes = self.ranks * (RANK_BYTES + 2 * self.workers * WORKER_BYTES)
        return self.blocks + processes


def load_of(config: DataConfig, *, ranks: int, batch_size: int, shards: int) -> Load:
    """What a recipe's data section asks of a node. shards: of the split that has more."""
    workers = config.num_workers
    largest = Sizes(size=config.train_size, progressive=config.progressive).largest
    blocks = sum(
        blocks_bytes(workers=workers, prefetch=config.prefetch, size=batch_size * side**2 * 3)
        for side in (largest, config.val_size)
    )
    reads = WORKER_FILES + min(shards, OPEN_SHARDS) + THREADS
    trains = RANK_FILES + 2 * workers * RANK_FILES_A_WORKER
    return Load(
        ranks=ranks,
        workers=workers,
        blocks=ranks * blocks,
        files=max(reads, trains) if workers else reads + trains,
    )


def check_memory(load: Load, machine: Machine) -> Finding:
    """Batches (which are no part of /dev/shm), loader workers and training processes."""
    text = (
        f"about {size(load.memory)} needed beside the network, {size(load.blocks)} of it for "
        f"batches; {size(machine.free)} free of {size(machine.memory)} ({machine.limited_by})"
    )
    less = "lower data.num_workers, data.prefetch or trainer.batch_size"
    if load.memory > machine.memory:
        return error("memory", text, f"{less}, or raise the limit")
    if load.memory > machine.free:
        return warning("memory", text, f"end what else runs here, or {less}")
    return ok("memory", text)


def check_shm(machine: Machine, *, gpus: int) -> Finding:
    """Of /dev/shm: the locks between processes, and NCCL's buffers."""
    remedy = "docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm"
    if machine.shm is None:
        return error("shared memory", "no /dev/shm, where locks between processes lie", remedy)
    text = f"{size(machine.shm)} free in /dev/shm, where batches do not lie"
    if machine.shm < _LITTLE_SHM:
        text += ", but locks between processes do"
        return error("shared memory", text, f"remove what fills it, or {remedy}")
    if gpus > 1 and machine.shm < _NCCL_SHM:
        text += f", but NCCL's buffers between {gpus} GPUs may"
        return warning("shared memory", text, remedy)
    return ok("shared memory", text)


def check_files(load: Load, machine: Machine) -> Finding:
    """`ulimit -n` against the process that opens the most."""
    limit, most = machine.open_files, machine.open_files_most
    text = f"a process opens up to {load.files}, " + (
        "and there is no limit" if limit >= UNLIMITED else f"the limit is {limit}"
    )
    if load.files <= limit:
        return ok("open files", text)
    root = "" if load.files <= most else f" by root: the hard limit is {most}"
    return error("open files", text, f"ulimit -n {load.files}{root}")


def check_cores(load: Load, machine: Machine) -> Finding:
    """Loader workers of all ranks against processors."""
    workers = load.ranks * load.workers
    text = f"{machine.cores:g} for {workers} loader workers ({load.ranks} x {load.workers})"
    if workers <= machine.cores:
        return ok("cores", text)
    fitting = f"data.num_workers={int(machine.cores) // load.ranks}"
    return warning("cores", text, f"{fitting}, and scripts/tune_workers.py finds the best")


def check_devices(*, accelerator: str, devices: int, gpus: int, cuda: str | None) -> Finding:
    """Devices asked for against GPUs found. cuda: that torch was built with."""
    if accelerator == "cpu":
        return ok("devices", f"{devices} processes on the CPU")
    if accelerator not in {"auto", "gpu", "cuda"}:
        return ok("devices", f"{devices} of {accelerator}, which only training can tell")
    text = f"{gpus} GPUs found, {devices} asked for (torch is built with {cuda or 'no'} CUDA)"
    if gpus >= devices:
        return ok("devices", text)
    see = "see nvidia-smi, CUDA_VISIBLE_DEVICES"
    if accelerator == "auto" and not gpus:
        return warning(
            "devices", f"{text}: the CPU trains", f"{see}; set trainer.accelerator=cpu if meant"
        )
    fewer = "lower --devices" if gpus else "set trainer.accelerator=cpu"
    return error("devices", text, f"{fewer}, or {see} and how many GPUs were given")


def check_decoder(decoder: str, pillow: str) -> Finding:
    """The decoder in use, as loaders.decode.decoder_name says it, and Pillow's."""
    if decoder != pillow:
        return ok("decoder", f"{decoder}; {pillow} for what that cannot take")
    return warning(
        "decoder",
        f"{decoder} alone",
        "the region decoder is faster: install again with gcc and the headers of libjpeg-turbo "
        "(Debian: apt-get install gcc libjpeg-dev), and set data.decoder=auto",
    )


def check_package(name: str, *, there: bool, needed: bool) -> Finding:
    """A package that the recipe asks for. needed: a run without it would stop."""
    if there:
        return ok("packages", f"{name} is there")
    remedy = f"pip install 'shardstream[{_EXTRAS.get(name, name)}]'"
    if needed:
        return error("packages", f"{name} is missing", remedy)
    return warning("packages", f"{name} is missing: the run goes on without", remedy)


def check_run(place: Place, *, checkpoint: int, copies: int, present: int) -> Finding:
    """The run's folder against its checkpoints. present: bytes of those that are there."""
    other = "choose another folder (--run FOLDER)"
    if place.problem:
        return error("run folder", f"{place.path} cannot be written: {place.problem}", other)
    text = f"{_described(place)}; up to {copies} checkpoints of {size(checkpoint)}"
    if checkpoint * copies > place.free + present:
        return error("run folder", text, f"free some space, or {other}")
    if place.kind in _MEMORY:
        return warning("run folder", text, f"it is memory, gone with the machine: {other}")
    return ok("run folder", text)


def check_cache(place: Place, *, limit: int, data: int, present: int) -> Finding:
    """The node's cache against its disk.

    limit: bytes that it may fill. data: bytes of all shards. present: bytes that it holds.
    """
    if place.problem:
        text = f"{place.path} cannot be written: {place.problem}"
        return error("cache", text, "set data.cache_dir")
    room = place.free + present
    text = f"{_described(place)}; {size(limit)} allowed, the data has {size(data)}"
    if min(limit, data) > room:
        return warning("cache", text, f"data.cache_gb={0.9 * room / 1e9:.3g}, or data.cache_dir")
    if place.kind in _MEMORY:
        return warning("cache", text, "it is memory: set data.cache_dir to a disk's folder")
    if place.kind.startswith(_NETWORK):
        return warning("cache", text, "it is on the network: set data.cache_dir to a local disk's")
    return ok("cache", text)


def check_clock(skew_s: float) -> Finding:
    """This machine's clock against the service's; positive where this one is ahead."""
    text = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the service's"
    remedy = "set it (chrony, or timedatectl set-ntp true): 15 minutes off, requests are refused"
    if abs(skew_s) >= _SKEW_REFUSED_S:
        return error("clock", text, remedy)
    return warning("clock", text, remedy) if abs(skew_s) > _SKEW_NOTED_S else ok("clock", text)


def size(number: float) -> str:
    """Bytes for people: '1.2 GB', '34 MB'."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def _described(place: Place) -> str:
    return f"{place.path} on {place.kind or 'an unknown file system'}, {size(place.free)} free"
