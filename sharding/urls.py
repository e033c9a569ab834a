"""Lists of tars as users write them: one pattern with shell braces.

s3://b/x-{000..146}.tar     147 tars          {a,b{1..2}}.tar     a.tar b1.tar b2.tar
"""

import re
from collections import Counter

from braceexpand import braceexpand

from sharding.errors import UsageError

SHARDS_LIMIT = 1_000_000
_PATTERN_LIMIT = 4096


def expand(url_pattern: str) -> list[str]:
    """The URLs that a pattern with shell braces stands for: `x-{000..146}.tar`, `{a,b}.tar`.

    They are counted before any is made. Raises UsageError for more than a million, for one that
    comes twice, and for braces that do not match.
    """
    if len(url_pattern) > _PATTERN_LIMIT or _count(url_pattern) > SHARDS_LIMIT:
        raise UsageError(
            f"{url_pattern:.200} is longer than {_PATTERN_LIMIT} characters or stands for more "
            f"than {SHARDS_LIMIT} tars; give less"
        )
    try:
        urls = list(braceexpand(url_pattern))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{url_pattern:.200} has braces that do not match") from error
    refuse_twice(urls)
    return urls


def refuse_twice(urls: list[str]) -> None:
    """Raise UsageError for a URL that comes twice."""
    for url, times in Counter(urls).items():
        if times > 1:
            raise UsageError(f"{url} comes {times} times; give each tar once")


def _count(pattern: str) -> int:
    """How many strings braceexpand would make; those that it refuses may be counted wrongly."""
    # A frame is an open brace: the strings of its alternative so far, those of the ones before,
    # and where its text began. The bottom one is the pattern itself.
    frames = [(1, 0, 0)]
    for match in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        sign = match[0]
        if sign == "{":
            frames.append((1, 0, match.end()))
        elif sign == "," and len(frames) > 1:
            product, before, begin = frames.pop()
            frames.append((1, before + product, begin))
        elif sign == "}" and len(frames) > 1:
            product, before, begin = frames.pop()
            inside = _range_length(pattern[begin : match.start()]) or before + product
            product, before, begin = frames.pop()
            frames.append((product * inside, before, begin))
    return frames[0][0]


def _range_length(text: str) -> int:
    """Numbers in `first..last[..step]`, as braceexpand counts them; 0 for other text."""
    match = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", text)
    if not match:
        return 0
    first, last, step = (int(number or 0) for number in match.groups())
    return abs(last - first) // (step or 1) + 1
