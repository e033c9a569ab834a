"""Samples of others' tars: what belongs to one is found, anything doubtful refused."""

import re
from pathlib import Path

import pytest

from sharding.dataset import PackedSplit
from sharding.errors import DataError
from tests.make_images import image
from tests.make_tars import GOOD, JPG, PNG, index_tars, rows_of, write_tar

BAD = {
    "out of group": ([*GOOD, ("a/1.txt", b"")], "'a/1.txt' at offset .*stands apart.*'a/1'"),
    "two images": ([*GOOD, ("b.jpg", JPG), ("b.png", PNG)], "'b.png'.*second"),
    "same image": ([("b.jpg", JPG), ("b.JPG", JPG), ("b.cls", b"1")], "'b.JPG'.*second image"),
    "two labels": ([("b.cls", b"1"), ("b.CLS", b"1"), ("b.jpg", JPG)], "second image or label"),
    "labels differ": (
        [("b.jpg", JPG), ("b.cls", b"1"), ("b.json", b'{"label": 2}')],
        "'b' has the label {1, 2}",
    ),
    "no label": ([*GOOD, ("b.jpg", JPG)], "'b' has no label"),
    "no label in JSON": ([("b.jpg", JPG), ("b.json", b'{"lable": 2}')], "'b' has no label"),
    "no image": ([*GOOD, ("b.cls", b"1")], "'b' has a label, but no image"),
    "no jpeg": ([("b.jpg", b"GIF89a"), ("b.cls", b"1")], "'b.jpg' at offset 512 is no JPEG"),
    "empty image": ([("b.jpg", b""), ("b.cls", b"1")], "'b.jpg' at offset 512 is no JPEG"),
    "no samples": ([("README", b"x"), ("b.txt", b"")], "holds no samples, only 2 other files"),
    "empty": ([], "holds no samples"),
    "long label": ([("b.jpg", JPG), ("b.cls", b"1".zfill(33))], "'b.cls'.* has 33 bytes"),
    "large JSON": ([("b.json", b" " * ((1 << 20) + 1))], "'b.json'.* has 1048577 bytes"),
    "deep JSON": ([("b.json", b"[" * 100_000)], "'b.json'.* is no JSON"),
    "long number": ([("b.json", b'{"label": %b}' % (b"9" * 5000))], "'b.json'.* is no JSON"),
    "JSON list": ([("b.json", b"[1]")], "'b.json'.* is no JSON object"),
}
for _label in (b"", b"-1", b"+1", b"1.0", b"1_0", b"0x1", "\u0663".encode(), b"1 2", b"4", b"n01"):
    BAD[f"cls {_label!r}"] = ([("b.jpg", JPG), ("b.cls", _label)], "'b.cls'.* gives the label")
for _value in ("true", "-1", "1.0", '"1"', "null", "[1]", "4", "1e3", "NaN"):
    BAD[f"json {_value}"] = (
        [("b.jpg", JPG), ("b.json", b'{"label": %b}' % _value.encode())],
        "'b.json'.* gives the label",
    )


@pytest.mark.parametrize(("files", "message"), BAD.values(), ids=BAD)
def test_refused(files: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    """A tar that is not plainly samples of four classes is refused; no manifest is left."""
    url = write_tar(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=f"^{re.escape(url)}.*{message}"):
        index_tars([url], tmp_path, classes=tuple("abcd"))
    assert not (tmp_path / "manifest.json").exists()


def test_accepted(tmp_path: Path) -> None:
    """JSON beside an equal label, other files anywhere in a group, and what webdataset skips."""
    files = [
        ("README", b"no extension"),
        ("__meta__/info.json", b"x"),
        ("a/._1.jpg", b"hidden"),
        ("notes.txt", b"a group without a sample"),
        ("a.b/1.txt", b""),
        ("a.b/1.JPeG", PNG),  # the bytes decide
        ("README2", b""),
        ("a.b/1.cls", b" 3\n"),
        ("a.b/1.json", b'{"label": 3}'),
        ("2.webp", image(3, "WEBP")),
        ("2.json", b'{"x": {"label": 9}, "label": 0}'),
    ]
    url = write_tar(tmp_path / "x.tar", files)
    told: list[int] = []
    index_tars([url], tmp_path, progress=lambda _, passed_over: told.append(passed_over))
    rows = rows_of(PackedSplit.open(str(tmp_path)))
    assert [(key, label) for key, _, label, *_ in rows] == [("a.b/1", 3), ("2", 0)]
    assert told == [6]
    assert index_tars([url], tmp_path / "y", classes=tuple("abcd")).classes == tuple("abcd")
