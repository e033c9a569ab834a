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
        except UsageError as error:
            status, message = EXIT_USAGE, str(error)
        except DataError as error:
            status, message = EXIT_DATA, str(error)
        except OSError as error:
            _discard_output()
            wrong_kind = error.errno in {errno.ENOTDIR, errno.EEXIST, errno.ELOOP}
            status, message = EXIT_USAGE if wrong_kind else 1, str(error)
        except KeyboardInterrupt:
            status, message = 130, "interrupted"
        else:
            return status
        print(f"{Path(sys.argv[0]).name}: error: {_one_line(message)}", file=sys.stderr)
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
