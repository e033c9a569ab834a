"""model/elastic.py: runs whose steps are cut anew when they go on, here and killed for real."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path
from random import Random
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train as train_program
from loaders.sizes import ProgressiveConfig
from model.checkpoint import AtomicCheckpointIO
from model.elastic import UnfinishedStepError, converted, whole_steps
from model.newest import newest_whole
from tests.test_resume import STEPS, Witness, fit
from tests.train_plain import plain_network

PIECES = (1, 2, 4)  # batches that a step of 8 samples is cut into
TOLERANCE = 1e-5
"""By how much weights of 12 to 160 steps, of which the largest is about 0.5, may differ where the
same gradients are added up in another order; they have 24 bits."""

GROWING = ProgressiveConfig(start_size=12, end_epoch=1)

steps, batches = st.integers(1, 500), st.integers(1, 64)


def cut(pieces: int) -> dict[str, Any]:
    """Steps of 8 samples in so many batches, as a user asks for them."""
    return {"batch_size": 8 // pieces, "global_batch_size": 8}


@given(steps, batches, st.floats(0, 1, exclude_min=True))
def test_parts_of_an_epoch_end_with_a_step(total: int, accumulate: int, share: float) -> None:
    """Lightning's own formula gives whole steps, and as many however they are cut."""
    told = whole_steps(share, steps=total, accumulate=accumulate)
    assert 0 < told <= 1
    assert int(total * accumulate * told) == max(1, int(share * total)) * accumulate


def loops(total: int, current: int, completed: int) -> dict[str, Any]:
    """What Lightning saves of its loops, as far as it matters."""

    def counts(ready: int) -> dict[str, int]:
        return {"ready": ready, "started": ready, "processed": ready, "completed": completed}

    progress = {"total": counts(total), "current": counts(current), "is_last_batch": False}
    fit_loop = {"epoch_loop.batch_progress": progress, "epoch_progress": {"current": 3}}
    return {"fit_loop": fit_loop, "validate_loop": {"state_dict": {}}}


@given(steps, steps, st.integers(0, 1), batches, batches)
def test_there_and_back_changes_nothing(
    total: int, current: int, open_batches: int, before: int, now: int
) -> None:
    """Converted twice, a state is what it was; the one that was given stays as it is."""
    given_ = loops(total * before, current * before, total * before - open_batches)
    kept = json.dumps(given_)
    there = converted(given_, before=before, now=now)
    assert there["fit_loop"]["epoch_loop.batch_progress"]["total"] == {
        "ready": total * now,
        "started": total * now,
        "processed": total * now,
        "completed": total * now - open_batches,
    }
    assert converted(there, before=now, now=before) == given_
    assert json.dumps(given_) == kept


def test_a_checkpoint_inside_a_step_is_refused() -> None:
    """Its gradients are lost; the error, of status 2, says where it is and what can be done."""
    expected = r"behind batch 2 of the 3 .* with 3 batches a"
    with pytest.raises(UnfinishedStepError, match=expected) as caught:
        converted(loops(11, 5, 11), before=3, now=1)
    assert train_program._outcome(caught.value) == (2, str(caught.value))


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of the training loop, without the batches of its validations."""
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    loops: dict[str, Any] = state["loops"]
    return loops


@pytest.mark.parametrize("interval", [0.34, pytest.param(1.0, marks=pytest.mark.slow)])
def test_converted_counters_are_those_of_a_run_of_that_kind(
    small_shards: Path, tmp_path: Path, interval: float
) -> None:
    """Behind each step and validation of two epochs, from every cut into every other."""
    for pieces in PIECES:
        (tmp_path / str(pieces)).mkdir()
        fit(small_shards, save=tmp_path / str(pieces), val_check_interval=interval, **cut(pieces))
    names = sorted(path.name for path in (tmp_path / "1").glob("*.ckpt"))
    assert len(names) == 2 * STEPS + (2 if interval == 1 else 6)
    for name in names:
        states = {pieces: state_of(tmp_path / str(pieces) / name) for pieces in PIECES}
        for before, now in permutations(PIECES, 2):
            there = converted(states[before], before=before, now=now)
            assert there == states[now], (before, now, name)


def by_step(witness: Witness) -> dict[tuple[int, int], list[int]]:
    """Samples of each (epoch, step), in the order of the global batch."""
    found: dict[tuple[int, int], list[int]] = {}
    for epoch, step, numbers in witness.seen:
        found.setdefault((epoch, step), []).extend(numbers)
    return found


def assert_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Weights that differ by rounding alone; returns by how much."""
    assert ours.keys() == theirs.keys()
    most = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert most <= TOLERANCE
    return most


@pytest.mark.parametrize(
    ("before", "now", "every", "options"),
    [
        (1, 4, 5, {}),
        (4, 1, 6, {"workers": 2, "val_check_interval": 0.34}),
        (2, 4, 5, {"limit_train_batches": 0.9, "val_check_interval": 0.4, "ema_decay": 0.8}),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                (1, 8, 1, {}),
                (8, 1, 1, {"workers": 2}),
                (2, 4, 1, {"val_check_interval": 0.34}),
                (4, 2, 1, {"val_check_interval": 0.5, "workers": 1}),
                (4, 1, 1, {"ema_decay": 0.8, "ema_every_n_steps": 2}),
                (8, 2, 1, {"data_options": {"progressive": GROWING}}),
            ]
        ),
    ],
    ids=str,
)
def test_resumed_in_other_pieces(
    small_shards: Path, tmp_path: Path, before: int, now: int, every: int, options: dict[str, Any]
) -> None:
    """The samples, rates and validations of each step that is left, and the weights in the end."""
    options = {"norm": False, **options}
    undisturbed, weights = fit(small_shards, save=tmp_path, **cut(before), **options)
    samples, checkpoints = by_step(undisturbed), sorted(tmp_path.glob("*.ckpt"))
    epoch_end = tmp_path / f"{sum(epoch == 0 for epoch, _ in samples):02}-step.ckpt"
    for checkpoint in {epoch_end, *checkpoints[::-every]}:
        step = int(checkpoint.name[:2])
        again = tmp_path / checkpoint.stem
        again.mkdir()
        resumed, end = fit(small_shards, resume=checkpoint, save=again, **cut(now), **options)
        assert by_step(resumed) == {key: samples[key] for key in samples if key[1] >= step}
        for later in again.glob("*.ckpt"):  # one can go on from these as well
            if int(later.name[:2]) > step:
                theirs = converted(state_of(tmp_path / later.name), before=before, now=now)
                assert state_of(later) == theirs, (checkpoint.name, later.name)
        assert resumed.rates == {
            at: undisturbed.rates[at] for at in undisturbed.rates if at >= step
        }
        due = step + ("validation" in checkpoint.name)
        expected = [one for one in undisturbed.validated if one[0] >= due]
        assert [at for at, _ in resumed.validated] == [at for at, _ in expected], checkpoint.name
        assert [loss for _, loss in resumed.validated] == pytest.approx(
            [loss for _, loss in expected], rel=1e-4
        )
        assert_close(end, weights)


def test_a_validation_made_up_for_at_an_epochs_end_can_be_gone_on_from(
    small_shards: Path, tmp_path: Path
) -> None:
    """Resumed between an epoch's last step and its validation, and again right behind that."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    undisturbed, _ = fit(small_shards, save=once, norm=False, **cut(1))
    fit(small_shards, resume=once / "06-step.ckpt", save=twice, norm=False, **cut(2))
    resumed, _ = fit(small_shards, resume=twice / "06-validation.ckpt", norm=False, **cut(4))
    samples = by_step(undisturbed)
    assert by_step(resumed) == {key: those for key, those in samples.items() if key[1] >= 6}
    assert [at for at, _ in resumed.validated] == [12]


class SaveInValidation(lightning.Callback):
    """Saves behind the first batch of each validation, as a preempted run may."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_validation_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        if not trainer.sanity_checking and arguments[3] == 0:
            trainer.save_checkpoint(self._folder / f"{trainer.global_step:02}.ckpt")


def test_a_validation_that_was_left_is_done_in_other_pieces(
    small_shards: Path, tmp_path: Path
) -> None:
    """With other batches of its own, too; then the run goes on."""
    options: dict[str, Any] = {"val_check_interval": 0.34, "norm": False}
    more = (SaveInValidation(tmp_path),)
    undisturbed, weights = fit(small_shards, more=more, **cut(4), **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 6
    for checkpoint in checkpoints[::-2]:
        step = int(checkpoint.stem)
        resumed, end = fit(small_shards, resume=checkpoint, **cut(1), **options)
        samples = {key: those for key, those in by_step(undisturbed).items() if key[1] >= step}
        assert by_step(resumed) == samples, step
        assert [at for at, _ in resumed.validated] == list(range(step, 13, 2)), step
        assert_close(end, weights)


class CrashError(Exception):
    """Raised in the middle of a run."""


class Crash(lightning.Callback):
    """Ends a run in front of a batch: the one of this number within this step."""

    def __init__(self, step: int, batch: int = 0) -> None:
        self._step = step
        self._left = batch

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            if not self._left:
                raise CrashError
            self._left -= 1


def test_checkpoints_and_validations_come_when_they_are_due(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended twice and cut anew each time: the same files at the same steps, none inside a step."""
    saved: list[tuple[str, int]] = []
    save = AtomicCheckpointIO.save_checkpoint

    def noting(
        self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, **options: Any
    ) -> None:
        ready = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert ready == checkpoint["global_step"] * checkpoint["split"]["accumulate"]
        saved.append((Path(path).name.split("-val_acc1")[0], checkpoint["global_step"]))
        save(self, checkpoint, path, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", noting)
    options: dict[str, Any] = {
        "val_check_interval": 0.34,  # behind every second step
        "checkpoint_every_n_steps": 3,
        "norm": False,
    }
    whole, weights = fit(small_shards, run=tmp_path / "whole", **cut(1), **options)
    expected, saved[:] = saved[:], []
    assert {("last.ckpt", step) for step in (3, 6, 9, 12)} < {*expected}

    run = tmp_path / "run"
    seen: dict[tuple[int, int], list[int]] = {}
    # The first checkpoint to go on from is of step 4; the second one of 9, and none of behind it.
    for pieces, crash in ((2, Crash(5, 1)), (4, Crash(9, 2)), (2, None)):
        begun, checkpoint = at_step(run), newest_whole(run / "checkpoints").path
        try:
            more = () if crash is None else (crash,)
            witness, end = fit(
                small_shards, resume=checkpoint, run=run, more=more, **cut(pieces), **options
            )
        except CrashError:
            assert begun < crash._step if crash else False
            continue
        seen = by_step(witness)
        assert begun == 9
        assert [at for at, _ in witness.validated] == [10, 12]
    assert seen == {key: samples for key, samples in by_step(whole).items() if key[1] >= 9}
    assert_close(end, weights)
    # At the end of a run that has found no better weights since it began, Lightning writes the last
    # ones once more.
    assert saved in (expected, [*expected, expected[-1]])


ROOT = Path(__file__).parents[1]
BATCH = 12  # divisible by 1, 2, 3 and 4 processes
EPOCH_STEPS = 4  # 51 samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a part of a run is cut; of one that is killed, behind how many batches of rank 0."""

    world: int
    batch_size: int
    workers: int
    kill_at: int = 0

    @property
    def batches(self) -> int:
        """Batches of a process that make a step."""
        return BATCH // self.world // self.batch_size

    def arguments(self, recipe: Path, run: Path, epochs: int) -> list[str]:
        """The command line: the same one but for processes, workers, and what fits on a device."""
        return [
            "--config", str(recipe), "--run", str(run), "--epochs", str(epochs), "--resume", "auto",
            "--global_batch_size", str(BATCH), "--devices", str(self.world),
            "--batch_size", str(self.batch_size), "--num_workers", str(self.workers),
            "schedule.name=constant",
        ]  # fmt: skip


def train_and_kill(line: list[str], run: Path, *, at_line: int) -> bytes:
    """Start a run; kill all its processes when rank 0 has begun so many batches; rank 0's trace.

    Rank 0 writes into a pipe, so that the batch is waited for, not looked for.
    """
    run.mkdir(exist_ok=True)
    trace, written = run / "samples-rank0.jsonl", b""
    os.mkfifo(trace)
    pipe = os.open(trace, os.O_RDWR | os.O_NONBLOCK)
    with (
        (run / "stderr").open("w+") as errors,
        subprocess.Popen(line, cwd=ROOT, stderr=errors, start_new_session=True) as process,
    ):
        watched = os.pidfd_open(process.pid)
        try:
            while written.count(b"\n") < at_line:
                ready, _, _ = select.select([pipe, watched], [], [], 200)
                assert ready == [pipe], (run / "stderr").read_text()
                written += os.read(pipe, 1 << 16)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    while select.select([pipe], [], [], 0)[0]:
        written += os.read(pipe, 1 << 16)
    os.close(watched)
    os.close(pipe)
    return written


def assert_samples(traces: list[bytes], part: Cut, expected: list[list[str]], start: int) -> int:
    """Each rank has its part of each step, in order, from `start` on; returns the steps begun.

    Each line names Lightning's number of the batch within the epoch, which is looked at too.
    """
    steps = 0
    each = BATCH // part.world
    for rank, trace in enumerate(traces):
        lines = [json.loads(text) for text in trace.splitlines(keepends=True) if text[-1:] == b"\n"]
        for number, line in enumerate(lines):
            step, piece = divmod(number, part.batches)
            step += start
            first = rank * each + piece * part.batch_size
            epoch, step_of_epoch = divmod(step, EPOCH_STEPS)
            assert line == {
                "epoch": epoch,
                "step": step,
                "batch": step_of_epoch * part.batches + piece,
                "keys": expected[step][first : first + part.batch_size],
            }, (rank, part)
        steps = max(steps, -(-len(lines) // part.batches))
    return steps


def undisturbed(recipe: Path, run: Path, epochs: int) -> list[list[str]]:
    """Samples of each step of a run in this process that nothing happens to."""
    alone = Cut(world=1, batch_size=BATCH, workers=0)
    assert train_program.main(alone.arguments(recipe, run, epochs)) == 0
    lines = (run / "samples-rank0.jsonl").read_text().splitlines()
    assert len(lines) == epochs * EPOCH_STEPS
    return [json.loads(line)["keys"] for line in lines]


def at_step(run: Path) -> int:
    """Where a run goes on."""
    found = newest_whole(run / "checkpoints")
    assert not found.broken
    return 0 if found.taken is None else found.taken.step


def train_in_parts(
    recipe: Path, run: Path, parts: list[Cut], expected: list[list[str]]
) -> Iterator[str]:
    """Do the parts of a run one behind the other, each but the last one killed; a line for each."""
    for part in parts:
        start, killed = at_step(run), bool(part.kill_at)
        arguments = part.arguments(recipe, run, len(expected) // EPOCH_STEPS)
        line = [sys.executable, "-m", "tests.train_plain", *arguments]
        files = [run / f"samples-rank{rank}.jsonl" for rank in range(part.world)]
        if killed:
            traces = [train_and_kill(line, run, at_line=part.kill_at)]
        else:
            if part.world == 1:
                assert train_program.main(arguments) == 0
            else:
                subprocess.run(line, cwd=ROOT, check=True, timeout=200)
            traces = [files[0].read_bytes()]
        traces += [path.read_bytes() if path.exists() else b"" for path in files[1:]]
        begun = assert_samples(traces, part, expected, start)
        assert killed or start + begun == len(expected)
        for path in files:
            path.unlink(missing_ok=True)
        yield f"{part}: steps {start} to {start + begun - 1}, killed: {killed}"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights in the end, and the momenta."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["optimizer_states"][0]["state"]
    momenta = {f"momentum {key}": value["momentum_buffer"] for key, value in state.items()}
    return {**checkpoint["state_dict"], **momenta}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process train the same network as tests/train_plain.py."""
    monkeypatch.setattr("recipes.build.build_network", plain_network)


@pytest.mark.usefixtures("plain")
def test_killed_and_cut_anew(small_recipe: Path, tmp_path: Path) -> None:
    """Two processes, then three, then one; batches and workers change, too."""
    expected = undisturbed(small_recipe, tmp_path / "whole", 6)
    parts = [
        Cut(world=2, batch_size=3, workers=1, kill_at=2 * 4 + 1),
        Cut(world=3, batch_size=4, workers=0, kill_at=5),
        Cut(world=1, batch_size=2, workers=2),
    ]
    done = list(train_in_parts(small_recipe, tmp_path / "run", parts, expected))
    print(*done, sep="\n")
    assert_close(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


# Every world follows every world, itself too, and has every number of workers once.
WALK = (1, 1, 2, 1, 3, 1, 4, 2, 2, 3, 2, 4, 3, 3, 4, 4, 1, 2, 3, 4)


def walk(seed: int) -> list[Cut]:
    """The parts of a run that is killed at random batches of random sizes, and ends alone."""
    random = Random(seed)
    workers = {world: random.sample(range(5), 5) for world in range(1, 5)}
    parts = []
    for world in WALK:
        sizes = [size for size in range(1, BATCH + 1) if BATCH // world % size == 0]
        size = random.choice(sizes)
        kill_at = random.randint(1, 8 * (BATCH // world // size))
        parts.append(
            Cut(world=world, batch_size=size, workers=workers[world].pop(), kill_at=kill_at)
        )
    assert not any(workers.values())
    assert len({*pairwise(WALK)}) == 16
    return [*parts, Cut(world=1, batch_size=3, workers=2)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("seed", [1])
def test_all_worlds_and_workers(small_recipe: Path, tmp_path: Path, seed: int) -> None:
    """Killed twenty times: worlds 1 to 4 behind each other, each with 0 to 4 workers."""
    expected = undisturbed(small_recipe, tmp_path / "whole", 40)
    for line in train_in_parts(small_recipe, tmp_path / "run", walk(seed), expected):
        print(line)
    most = assert_close(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))
    print(f"weights differ by at most {most:.2g}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("world", "size"), [(1, 3), (2, 3), (3, 2), (4, 3)])
def test_equal_cuts_end_with_equal_bits(
    small_recipe: Path, tmp_path: Path, world: int, size: int
) -> None:
    """Killed twice at random batches: weights and momenta of a run that was not, to the bit."""
    random = Random(world * 100 + size)
    expected = undisturbed(small_recipe, tmp_path / "alone", 6)
    whole = Cut(world=world, batch_size=size, workers=0)
    kills = [random.randint(1, 8 * whole.batches) for _ in range(2)]
    parts = [
        *(
            Cut(world=world, batch_size=size, workers=random.randint(0, 4), kill_at=kill)
            for kill in kills
        ),
        Cut(world=world, batch_size=size, workers=random.randint(0, 4)),
    ]
    for folder, what in (("whole", [whole]), ("run", parts)):
        for line in train_in_parts(small_recipe, tmp_path / folder, what, expected):
            print(line)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_close(ours, weights_of(tmp_path / "alone"))
