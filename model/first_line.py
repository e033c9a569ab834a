"""Other people's errors in our one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; what it is, where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
