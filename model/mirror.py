"""A second place for checkpoints, which a thread brings there while training goes on.

Of each name the newest waits, no others: a store that is slower than training gets fewer, and
never old ones late. What fails is told with its count, tried again with the next checkpoint, and
once more at the end; it never stops a run.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import lightning

from model.checkpoint import LAST
from model.first_line import first_line
from model.hashes import Content
from model.preemption import PreemptedError
from model.published import Published

FINISH_S = 300.0
"""How long the end of a run may wait for what is under way."""
HURRY_S = 20.0
"""The same after a preemption: whoever asked for it kills after some 30 s."""
FAILED_S = 5.0
"""The same after an error: the other ranks, or what starts the run again, wait."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done for a name."""

    name: str
    content: Content | None = None
    """What to publish; None: the checkpoint is wanted no more."""
    stream: BinaryIO | None = None
    """Open, so that it stays what it is when the file is replaced."""

    def done_with(self) -> None:
        """Let go of the file."""
        if self.stream is not None:
            self.stream.close()

    def __str__(self) -> str:
        if self.content is None:
            return f"the removal of {self.name}"
        step = "" if self.content.step is None else f" of step {self.content.step}"
        return f"{self.name}{step}"


class Mirror:
    """Publishes in a thread what a run writes. For one process of the run, which writes alone."""

    def __init__(
        self,
        published: Published,
        *,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._published = published
        self._warn = warn
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: dict[str, Task] = {}
        self._failed: dict[str, Task] = {}
        self._current: Task | None = None
        self._failures = 0  # since something worked
        self._last_step: int | None = None
        self._closed = False  # nothing comes any more
        self._over = False  # nothing is tried any more
        self._thread: threading.Thread | None = None

    def publish(self, path: Path, content: Content) -> None:
        """A whole checkpoint was written here. Returns at once."""
        try:
            self._add(Task(path.name, content, path.open("rb")))
        except OSError as error:
            self._told(f"publish {path.name}", error)

    def remove(self, name: str) -> None:
        """The checkpoint is wanted no more. Returns at once."""
        self._add(Task(name))

    def close(self, timeout_s: float = FINISH_S) -> None:
        """Wait until all is published, what failed once more; say what is not in that time."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._again()
            self._changed.notify_all()
            end = self._clock() + timeout_s
            while self._busy() and (left := end - self._clock()) > 0:
                self._changed.wait(left)
            missing = [*self._waiting.values(), *self._failed.values()]
            for task in missing:
                task.done_with()
            self._waiting, self._failed, self._over = {}, {}, True
            if self._current is not None:
                missing.append(self._current)
        if missing:
            self._warn(
                f"not in {self._published.url} at the end: {', '.join(map(str, missing))} "
                f"({self._worked()}); the run's folder has what was written"
            )

    def _add(self, task: Task) -> None:
        with self._changed:
            for tasks in (self._waiting, self._failed):
                older = tasks.pop(task.name, None)
                if older is not None:
                    older.done_with()
            if self._closed:
                task.done_with()
                return
            self._waiting[task.name] = task
            self._again()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="checkpoint mirror", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _again(self) -> None:
        """Let what failed wait again."""
        self._waiting |= self._failed
        self._failed = {}

    def _busy(self) -> bool:
        return bool(self._waiting) or self._current is not None

    def _work(self) -> None:
        self._try("remove what was left half-written", self._published.sweep)
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                name = LAST if LAST in self._waiting else next(iter(self._waiting))
                task = self._current = self._waiting.pop(name)
            worked = self._try(f"publish {task}", lambda task=task: self._carry_out(task))  # type: ignore[misc]
            with self._changed:
                self._current = None
                newer = task.name in self._waiting
                if not (worked or newer or self._over):
                    self._failed[task.name] = task
                else:
                    task.done_with()
                if worked and task.name == LAST and task.content is not None:
                    self._last_step = task.content.step
                self._changed.notify_all()

    def _carry_out(self, task: Task) -> None:
        if task.content is None or task.stream is None:
            self._published.remove(task.name)
            return
        task.stream.seek(0)
        self._published.put(task.name, task.stream, task.content)

    def _try(self, what: str, do: Callable[[], Any]) -> bool:
        """Whether it worked; warns if not."""
        try:
            do()
        except Exception as error:  # noqa: BLE001  (whatever it is, training is worth more)
            self._told(what, error)
            return False
        self._failures = 0
        return True

    def _told(self, what: str, error: Exception) -> None:
        self._failures += 1
        self._warn(
            f"cannot {what} in {self._published.url} (failure {self._failures} in a row, "
            f"{self._worked()}): {first_line(error)}; training goes on, the next checkpoint tries "
            "again"
        )

    def _worked(self) -> str:
        if self._last_step is None:
            return f"this process has not published {LAST} yet"
        return f"{LAST} there is of step {self._last_step}"


class Publishing(lightning.Callback):
    """Ends the mirror in time where a run ends early.

    After a preemption all ranks wait for it: a launcher may kill the others when the first ends.
    """

    def __init__(self, mirror: Mirror | None) -> None:
        """mirror: None on all ranks but the one that writes."""
        self._mirror = mirror

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Finish in a hurry; all ranks raise PreemptedError at the same step."""
        preempted = isinstance(exception, PreemptedError)
        if self._mirror is not None:
            self._mirror.close(HURRY_S if preempted else FAILED_S)
        if preempted:
            trainer.strategy.barrier("published")
