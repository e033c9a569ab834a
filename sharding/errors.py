"""The two errors a user meets, and the one place that turns them into a line and an exit status."""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_USAGE = 2
EXIT_DATA = 3


class UsageError(ValueError):
    """Raised when a command, an option or a recipe asks for what cannot be done."""


class DataError(Exception):
    """Raised when source files or stored bytes are not what they have to be; names the place."""


class BadImageError(DataError):
    """Raised for an image that cannot be used; the one kind of fault that a packer may skip."""


# What is used up, and where more of it comes from; and a path through what is no folder.
_REMEDIES = {
    errno.EMFILE: "raise the limit of this shell (`ulimit -n 65536`), or use fewer workers",
    errno.ENFILE: "the whole machine has too many open: raise fs.file-max, or end other programs",
    errno.ENOSPC: "free some space (see `df -h`), or use another disk",
    errno.EDQUOT: "free some of your quota, or use another disk",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.ENOMEM: "use fewer workers, or a larger limit of memory (`ulimit -v`, control group)",
}


def with_remedy(error: OSError) -> str:
    """The error's text and, where that is known, what to do."""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error}; {remedy}" if remedy else str(error)


def outcome(error: BaseException) -> tuple[int, str] | None:
    """Exit status and message of an error that a user is meant to see; None: a bug of ours."""
    if isinstance(error, UsageError):
        return EXIT_USAGE, str(error)
    if isinstance(error, DataError):
        return EXIT_DATA, str(error)
    if isinstance(error, OSError):
        wrong_kind = error.errno in {errno.ENOTDIR, errno.EEXIST, errno.ELOOP}
        return EXIT_USAGE if wrong_kind else 1, with_remedy(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return None


def complain(message: str) -> None:
    """Write an error's one line to stderr."""
    print(f"{Path(sys.argv[0]).name}: error: {_one_line(message)}", file=sys.stderr, flush=True)


def reports_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap an entry point: each of our errors becomes one line on stderr and an exit status.

    0 done, 1 the system failed (a full disk, no permission), 2 wrong use, 3 bad data. Any other
    exception is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            status = main(*args, **kwargs)
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        except BrokenPipeError:  # the reader of our output went away: `shard.py info | head`
            _discard_output()
            return 0
        except (UsageError, DataError, OSError, KeyboardInterrupt) as error:
            if isinstance(error, OSError):
                _discard_output()
            known = outcome(error)
            assert known is not None
            status, message = known
            complain(message)
        return status

    return wrapped


def _one_line(message: str) -> str:
    """The message with what file names may hide in it, line breaks and escapes, made visible."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in message
    )


def _discard_output() -> None:
    """Let what stands in stdout's buffer go nowhere: at exit, writing it would fail once more."""
    with contextlib.suppress(OSError, ValueError):  # not a real file, in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
