"""Carries a plan out: shards made in parallel, crash-safe, and resumable.

Each shard is published whole (tar, then index), the manifest when all are there. A packer that was
killed is started again with the same command: a shard that holds, byte for byte, what the plan
makes of its images is kept, everything else is made again. So the result is that of an
undisturbed run, whichever processes of whichever machines made it.

The source must not change in between: an image that was replaced by another of the same name and
size is not noticed in a shard that is kept, for a kept shard is not compared with its source.
"""

import errno
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import xxhash

from sharding.errors import DataError, UsageError
from sharding.executors import open_map
from sharding.lock import Part, locked, marked
from sharding.manifest import (
    MANIFEST_NAME,
    ImageRules,
    Manifest,
    Packing,
    Shard,
    SourceCounts,
    tar_name,
)
from sharding.plan import plan_shards, stored_bytes
from sharding.source import Listing
from sharding.store import LocalStore, Store
from sharding.task import PackedShard, ShardTask, find_shard, make_shard

REJECTED_NAME = "rejected.jsonl"

Progress = Callable[[Shard], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is packed, by which rules, and where to."""

    listing: Listing
    store: Store
    split: str
    packing: Packing = field(default_factory=Packing)
    rules: ImageRules = field(default_factory=ImageRules)

    def __post_init__(self) -> None:
        _refuse_shared_keys(self.listing)

    @cached_property
    def tasks(self) -> list[ShardTask]:
        """The plan: one task a shard."""
        listing = self.listing
        return [
            ShardTask(
                source=listing.root,
                store=self.store,
                split=self.split,
                number=number,
                paths=[listing.paths[i] for i in samples],
                files=[listing.files[i] for i in samples],
                labels=listing.labels[samples].tolist(),
                sizes=listing.sizes[samples].tolist(),
                rules=self.rules,
            )
            for number, samples in enumerate(plan_shards(listing.sizes, self.packing))
        ]

    @cached_property
    def plan(self) -> str:
        """Identity of the plan: shards that were left half done belong to one."""
        identity = xxhash.xxh3_128()
        options = [self.split, self.listing.classes, asdict(self.packing), asdict(self.rules)]
        identity.update(json.dumps(options).encode())
        identity.update("\0".join(self.listing.paths).encode())
        identity.update(self.listing.labels.tobytes())
        identity.update(self.listing.sizes.tobytes())
        return identity.hexdigest()


def pack(
    job: Job, *, workers: int, cluster: str | None = None, progress: Progress = lambda _: None
) -> Manifest:
    """Make every shard and the manifest; `progress` is told of each. See open_map for `cluster`.

    Raises UsageError when the folder holds something else or another packer is at work,
    DataError for a bad image (unless the rules skip it), for a file that changed since it was
    listed, and for one that shares its key with another, OSError where space is short.
    """
    with _held(job, None, lambda: _clear(job)):
        if MANIFEST_NAME in job.store.sizes():
            return _compare(job, workers, cluster, progress)
        job.store.sweep()
        packed = _make(job, job.tasks, workers, cluster, progress)
        return _finish(job, packed)


def pack_part(
    job: Job,
    part: Part,
    *,
    workers: int,
    cluster: str | None = None,
    progress: Progress = lambda _: None,
) -> int:
    """Make one part's shards and no manifest, while others make the rest; returns how many.

    Raises what `pack` does.
    """
    with _held(job, part, lambda: None):
        if MANIFEST_NAME in job.store.sizes():
            raise UsageError(f"{job.store.url} is a finished data set: it was sealed already")
        tasks = job.tasks[part.i :: part.n]
        _make(job, tasks, workers, cluster, progress)
        return len(tasks)


def seal(
    job: Job, *, workers: int, cluster: str | None = None, progress: Progress = lambda _: None
) -> Manifest:
    """Read every shard that the parts made and write the manifest.

    Raises DataError where a shard is missing or is not what the plan makes, UsageError while a
    part is at work, and where the shards were made by another plan.
    """

    def refuse() -> None:
        raise UsageError(
            f"the shards in {job.store.url} were packed of other images or with other options, or "
            "there are none; give `seal` what `pack` was given"
        )

    with _held(job, None, refuse):
        if MANIFEST_NAME in job.store.sizes():
            return _compare(job, workers, cluster, progress)
        packed, missing = _find(job, workers, cluster, progress)
        if missing:
            names = ", ".join(tar_name(job.split, number) for number in missing[:5])
            raise DataError(
                f"{job.store.url}: {len(missing)} of {len(job.tasks)} shards are missing or not "
                f"whole: {names}{', ...' if len(missing) > 5 else ''}; run their parts again"
            )
        return _finish(job, packed)


def _held(
    job: Job, part: Part | None, other_plan: Callable[[], None]
) -> AbstractContextManager[None]:
    if isinstance(job.store, LocalStore):
        return locked(job.store.root, plan=job.plan, part=part, other_plan=other_plan)
    return marked(job.store, plan=job.plan, part=part, other_plan=other_plan)


def _make(
    job: Job, tasks: list[ShardTask], workers: int, cluster: str | None, progress: Progress
) -> list[PackedShard]:
    if isinstance(job.store, LocalStore) and not job.rules.converts:  # else nobody knows
        _check_space(job.store, tasks)
    packed = []
    with open_map(workers=max(1, min(workers, len(tasks))), cluster=cluster) as map_:
        for one in map_(make_shard, tasks):
            packed.append(one)
            progress(one.shard)
    return packed


def _find(
    job: Job, workers: int, cluster: str | None, progress: Progress
) -> tuple[list[PackedShard], list[int]]:
    """The plan's shards that stand there, and the numbers of those that are missing or wrong."""
    packed, missing = [], []
    with open_map(workers=min(workers, len(job.tasks)), cluster=cluster) as map_:
        for number, one in map_(find_shard, job.tasks):
            if one is None:
                missing.append(number)
            else:
                packed.append(one)
                progress(one.shard)
    return packed, sorted(missing)


def _compare(job: Job, workers: int, cluster: str | None, progress: Progress) -> Manifest:
    """The manifest of a finished data set. Raises UsageError if the job makes another one."""
    packed, missing = _find(job, workers, cluster, progress)
    text = job.store.read(MANIFEST_NAME)
    if missing or _manifest(job, packed).to_json().encode() != text:
        raise UsageError(
            f"{job.store.url} holds a finished data set that these images and options do not make, "
            "or a damaged one (`shard.py verify` tells); choose another folder, or remove this one"
        )
    return Manifest.from_json(text)


def _finish(job: Job, packed: list[PackedShard]) -> Manifest:
    """Write rejects, if there are any, and last the manifest."""
    manifest = _manifest(job, packed)
    rejects = [reject for one in _sorted(packed) for reject in one.rejects]
    job.store.sweep()  # what a lost worker left
    job.store.delete(REJECTED_NAME)
    lines = "".join(json.dumps(reject._asdict()) + "\n" for reject in rejects)
    for name, text in ((REJECTED_NAME, lines), (MANIFEST_NAME, manifest.to_json())):
        if text:
            with job.store.create(name) as stream:
                stream.write(text.encode())
    return manifest


def _manifest(job: Job, packed: list[PackedShard]) -> Manifest:
    rejected = sum(len(one.rejects) for one in packed)
    kinds = sum((Counter(one.kinds) for one in packed), Counter[str]())
    found = len(job.listing)
    return Manifest(
        split=job.split,
        classes=job.listing.classes,
        source=SourceCounts(
            found=found,
            packed=found - rejected,
            rejected=rejected,
            kinds=dict(sorted(kinds.items())),
        ),
        shards=tuple(one.shard for one in _sorted(packed)),
        packing=job.packing,
        images=job.rules,
    )


def _sorted(packed: list[PackedShard]) -> list[PackedShard]:
    return sorted(packed, key=lambda one: one.number)


def _check_space(store: LocalStore, tasks: list[ShardTask]) -> None:
    """Raises OSError where the tasks' shards will not fit. What stands there already counts."""
    present = store.sizes()
    needed = sum(
        max(int(stored_bytes(np.array(task.sizes)).sum()) - present.get(name, 0), 0)
        for task in tasks
        for name in [tar_name(task.split, task.number)]
    )
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{store.url} needs {_in_words(needed)} more and has {_in_words(free)} free; the same "
            "command goes on when there is",
        )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _clear(job: Job) -> None:
    """Remove the shards that another plan left half done."""
    for name in job.store.sizes():
        if re.fullmatch(rf"{re.escape(job.split)}-\d{{6,}}\.(tar|npy)", name):
            job.store.delete(name)


def _refuse_shared_keys(listing: Listing) -> None:
    first_with: dict[str, str] = {}
    for path, file in zip(listing.paths, listing.files, strict=True):
        stem = path.rpartition(".")[0]
        other = first_with.setdefault(stem, file)
        if other is not file:
            raise DataError(
                f"{listing.root / other} and {listing.root / file} would share the key {stem!r}; "
                "rename one"
            )
