"""What a run of a recipe would meet on this machine: one finding after the other, before it starts.

A node is asked by itself: `srun python train.py --config ... --doctor` asks all.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from loaders.augment import centre_crops
from loaders.cache import SegmentCache
from loaders.datamodule import ImageNetData
from loaders.decode import DecodeError, decoder_name, get_decoder, image_size
from loaders.machine import Machine, port_problem, this_machine, this_place
from loaders.reader import OPEN_SHARDS, Reader, ShardReader
from loaders.topology import Topology, check_identity
from model.networks import build_network, misfit
from recipes import checks
from recipes.build import build_data
from recipes.checks import Finding
from recipes.record import RECIPE, differences
from recipes.schema import Recipe, as_dict
from sharding.errors import EXIT_DATA, EXIT_USAGE, DataError, UsageError
from sharding.manifest import MANIFEST_NAME
from sharding.retry import RetryPolicy
from sharding.store import open_store
from sharding.unpacked import unpacked

# Checkpoints of a run: the last and the one before, the best three, the one that is being written.
_COPIES = 2 + 3 + 1
_BEST_OF_AVERAGE = 3
_OPTIMIZER_COPIES = {"sgd": 1, "lamb": 2}
"""Of each weight, in the optimizer's state."""
_HASTY = RetryPolicy(budget_s=15, requests=3, connect_s=5, stall_s=5, reach_s=10)
"""For a service that may not be there; a run would wait for minutes."""


def examine(
    recipe: Recipe,
    run: Path | None,
    *,
    checkpoint: Callable[[], Path | None],
    environ: Mapping[str, str] = os.environ,
) -> Iterator[Finding]:
    """All findings, each when it is known.

    run: the run's folder; None: nothing is written. checkpoint: what the run would go on from;
    raises UsageError and DataError as it does in a run.
    """
    machine = this_machine()
    yield from _machine(recipe, machine, environ)
    found = list(_store(recipe.data.root))
    yield from found
    data = None
    if not checks.exit_status(found):
        try:
            data = build_data(recipe)
            yield from _data(recipe, data)
        except (DataError, UsageError, OSError) as error:
            yield _failed("data", error)
    shards = max(len(data.train.counts), len(data.val.counts)) if data else OPEN_SHARDS
    trainer = recipe.trainer
    load = checks.load_of(
        recipe.data, ranks=trainer.devices, batch_size=trainer.batch_size, shards=shards
    )
    yield checks.check_cores(load, machine)
    yield checks.check_memory(load, machine)
    yield checks.check_files(load, machine)
    if data is not None:
        yield from _cache(data)
    if run is not None:
        yield _run(recipe, run, classes=len(data.train.classes) if data else 1000)
        try:
            yield _checkpoint(checkpoint(), recipe, data)
        except (DataError, UsageError, OSError) as error:
            yield _failed("checkpoint", error)


def checkpoint_bytes(recipe: Recipe, classes: int) -> int:
    """About how large a checkpoint of this recipe is: weights, averages, the optimizer's state."""
    network = _network(recipe, classes)
    tensors = network.state_dict().values()
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    trained: int = sum(p.numel() * p.element_size() for p in network.parameters())
    copies = _OPTIMIZER_COPIES[recipe.optim.name]
    if recipe.optim.name == "sgd" and not recipe.optim.momentum:
        copies = 0
    return weights * (2 if recipe.trainer.ema_decay else 1) + trained * copies


def find_devices(recipe: Recipe) -> Finding:
    """The devices that the recipe asks for, against those that this node has."""
    return checks.check_devices(
        accelerator=recipe.trainer.accelerator,
        devices=recipe.trainer.devices,
        gpus=torch.cuda.device_count(),
        cuda=torch.version.cuda,
    )


def _machine(recipe: Recipe, machine: Machine, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Devices, the way between nodes, and what has to be installed."""
    yield find_devices(recipe)
    yield checks.check_shm(machine, gpus=min(torch.cuda.device_count(), recipe.trainer.devices))
    host, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if host and port and "TORCHELASTIC_RUN_ID" not in environ:  # torchrun's is in use, by itself
        yield _rendezvous(host, port)
    yield checks.check_decoder(decoder_name(recipe.data.decoder), decoder_name("pillow"))
    wanted = {
        "wandb": recipe.logging.wandb,
        "tensorboard": recipe.logging.tensorboard,
        "matplotlib": recipe.optim.finds_lr,
    }
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        yield checks.check_package(
            name, there=find_spec(name) is not None, needed=name == "matplotlib"
        )


def _rendezvous(host: str, port: str) -> Finding:
    remedy = "set MASTER_ADDR to the first node's name and MASTER_PORT to a free port of it"
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        return checks.error("rendezvous", f"MASTER_PORT is {port!r}", remedy)
    if problem := port_problem(host, int(port)):
        return checks.error("rendezvous", problem, remedy)
    return checks.ok("rendezvous", f"{host}:{port}, as far as this node can tell")


def _store(root: str) -> Iterator[Finding]:
    """Shards on S3: address, credentials and access with two requests; the clock by the answer."""
    if not root.startswith("s3://"):
        return
    try:
        store = open_store(f"{root.rstrip('/')}/train")
        from sharding.s3 import S3Store  # noqa: PLC0415  (boto3 is optional, and slow to import)

        assert isinstance(store, S3Store)
        store.service = replace(store.service, policy=_HASTY)
        began = time.time()
        answer = store.service.ask(
            f"list {store.url}",
            lambda s3: s3.list_objects_v2(Bucket=store.bucket, Prefix=store.key(""), MaxKeys=1),
        )
        ended = time.time()
        read = len(store.read(MANIFEST_NAME))
    except FileNotFoundError as error:
        yield checks.error("store", str(error), unpacked(store.url), EXIT_DATA)
        return
    except (DataError, UsageError, OSError) as error:
        yield _failed("store", error)
        return
    said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if said is not None:
        yield checks.check_clock((began + ended) / 2 - parsedate_to_datetime(said).timestamp())
    yield checks.ok(
        "store", f"{store.url}: listed in {ended - began:.2f} s, {read:,} bytes of manifest read"
    )


def _data(recipe: Recipe, data: ImageNetData) -> Iterator[Finding]:
    """The splits, opened, with a few samples of each; raises what a run would raise."""
    config, trainer = recipe.data, recipe.trainer
    for name, reader, interpolation in (
        ("train", data.train, "bilinear"),
        ("val", data.val, config.val_interpolation),
    ):
        samples = sum(reader.counts)
        tried = sorted({0, samples // 2, samples - 1})
        for number in tried:
            _try_sample(reader, number, config.decoder, interpolation)
        yield checks.ok(
            name,
            f"{samples:,} images of {len(reader.classes)} classes in {len(reader.counts):,} "
            f"shards, digest {reader.digest}; {len(tried)} read, checked and decoded",
        )
    Topology(  # checks that batches can be cut so
        global_batch=trainer.global_batch,
        world=trainer.world,
        accumulate=trainer.batches_per_step,
        repeats=config.repeats,
    )
    steps = data.steps(trainer.global_batch)
    yield checks.ok("steps", f"{steps:,} an epoch, of {trainer.global_batch} images")


def _try_sample(reader: Reader, number: int, decoder: str, interpolation: str) -> None:
    """Raises DataError where a sample is missing, damaged or no image."""
    data = reader.read(number)
    try:
        sides = np.array([image_size(data)])
        crops = centre_crops(sides[:, 0], sides[:, 1], resize=64, size=64)
        left, top, right, bottom = crops.boxes[0].tolist()
        out = np.empty((64, 64, 3), np.uint8)
        decode = get_decoder(decoder, interpolation)
        decode(out, data, (left, top, right, bottom), False, crops.exact)
    except DecodeError as error:
        raise DataError(f"{reader.describe(number)}: cannot be decoded: {error}") from error


def _cache(data: ImageNetData) -> Iterator[Finding]:
    """The node's cache, where there is one."""
    config = data._cache(1.0)  # noqa: SLF001  (of all ranks, which only a trainer knows)
    if config is None:
        return
    splits = [r.split for r in (data.train, data.val) if isinstance(r, ShardReader)]
    place = this_place(config.folder)
    caches = [] if place.problem else [SegmentCache(config.folder, split) for split in splits]
    yield checks.check_cache(
        place,
        limit=config.limit,
        data=sum(shard.bytes for split in splits for shard in split.manifest.shards),
        present=sum(sum(cache.sizes().values()) for cache in caches),
    )


def _run(recipe: Recipe, run: Path, *, classes: int) -> Finding:
    """The run's folder, with room for its checkpoints."""
    return checks.check_run(
        this_place(run),
        checkpoint=checkpoint_bytes(recipe, classes),
        copies=_COPIES + (_BEST_OF_AVERAGE if recipe.trainer.ema_decay else 0),
        present=sum(path.stat().st_size for path in (run / "checkpoints").glob("*.ckpt")),
    )


def _checkpoint(path: Path | None, recipe: Recipe, data: ImageNetData | None) -> Finding:
    """Where the run would start, if it can: raises UsageError and DataError as it would."""
    if path is None:
        return checks.ok("checkpoint", "from scratch")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    text = f"{path}, epoch {state.get('epoch')}, step {state['global_step']}"
    if data is None:
        return checks.ok("checkpoint", f"goes on from {text}")
    mine = data.identity(recipe.trainer.global_batch)
    check_identity(state.get(type(data).__qualname__, mine), mine)  # as Lightning names it
    here = _network(recipe, len(data.train.classes)).state_dict(prefix="network.")
    if reason := misfit(state.get("state_dict", {}), here):
        raise UsageError(f"{path} is of another model, {reason}")
    if state["global_step"] >= recipe.trainer.epochs * data.steps(recipe.trainer.global_batch):
        return checks.warning("checkpoint", f"{text}: the run has ended", "--epochs goes further")
    changed = differences(state.get(RECIPE, {}), as_dict(recipe))
    if changed:
        return checks.warning(
            "checkpoint", f"goes on from {text}", f"with other values: {', '.join(changed)}"
        )
    return checks.ok("checkpoint", f"goes on from {text}")


def _network(recipe: Recipe, classes: int) -> nn.Module:
    """Shapes alone, no weights."""
    with torch.device("meta"):
        return build_network(replace(recipe.model, compile=False), classes)


def _failed(name: str, error: Exception) -> Finding:
    status = EXIT_DATA if isinstance(error, DataError) else EXIT_USAGE
    return checks.error(name, str(error), status=status)
