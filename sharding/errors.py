"""The two errors a user meets, and the one place that turns them into a line and an exit status."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_USAGE = 2
EXIT_DATA = 3


class UsageError(ValueError):
    """Raised when a command, an option or a recipe asks for what cannot be done."""


class DataError(Exception):
    """Raised when source files or stored bytes are not what they have to be; names the place."""


def reports_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap an entry point: each of our errors becomes one line on stderr and an exit status.

    0 done, 1 the system failed (a full disk, no permission), 2 wrong use, 3 bad data. Any other
    exception is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs)
        except UsageError as error:
            status, message = EXIT_USAGE, str(error)
        except DataError as error:
            status, message = EXIT_DATA, str(error)
        except BrokenPipeError:  # the reader of our output went away: `shard.py info | head`
            sys.stderr.close()
            return 0
        except OSError as error:
            status, message = 1, str(error)
        except KeyboardInterrupt:
            status, message = 130, "interrupted"
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        return status

    return wrapped
