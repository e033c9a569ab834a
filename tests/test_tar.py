"""Tar: deterministic members, and names that every reader reads alike."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
import xxhash
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sharding import tar

# All that a file's name may hold, with what readers stumble over drawn more often.
trouble = st.sampled_from([".", "..", "%", "%2E", "__", "_", " ", "é", "日本", "\\", "-", "x" * 90])
ordinary = st.text(st.characters(exclude_characters="/\0\n", exclude_categories=["Cs"]), min_size=1)
name = (
    st.lists(trouble | ordinary, min_size=1, max_size=4).map("".join).filter(lambda n: n[0] != ".")
)
extension = st.sampled_from(["jpg", "JPEG", "png", "webp"])
folders = st.lists(name, min_size=1, max_size=3).map("/".join)
paths = st.builds("{}/{}.{}".format, folders, name, extension)


def written(samples: dict[str, bytes]) -> bytes:
    """A tar of these files, each with a label behind it."""
    blocks: list[bytes] = []
    for path, data in samples.items():
        key, extension = tar.member_name(path)
        blocks += [*tar.member(f"{key}.{extension}", data), *tar.member(f"{key}.cls", b"3")]
    return b"".join([*blocks, tar.END])


@given(st.dictionaries(paths, st.binary(max_size=1100), max_size=5))
def test_tarfile_reads_members(samples: dict[str, bytes]) -> None:
    """Python's tarfile finds each name and each byte, and `path_of` gives the file's own name."""
    with tarfile.open(fileobj=io.BytesIO(written(samples)), mode="r:") as archive:
        found = {}
        for entry in archive:
            stream = archive.extractfile(entry)
            assert stream is not None
            assert (entry.mtime, entry.mode, entry.uid, entry.gid) == (0, 0o644, 0, 0)
            assert (entry.isreg(), entry.uname, entry.gname) == (True, "", "")
            found[tar.path_of(entry.name)] = stream.read()
    labels = {path.rpartition(".")[0] + ".cls" for path in samples}
    assert found == samples | dict.fromkeys(labels, b"3")


@settings(deadline=None)
@given(st.dictionaries(paths, st.binary(min_size=1, max_size=9), max_size=5))
@example(
    {"__a__/__b__.jpg": b"1", "n.1/x.y.jpg": b"2", "a/__.png": b"3", f"{'é' * 99}/a%.jpg": b"4"}
)
def test_webdataset_reads_every_sample(samples: dict[str, bytes]) -> None:
    """Stock webdataset's reader yields every sample under its key, with image and label."""
    keys = {tar.member_name(path): data for path, data in samples.items()}
    assume(len({key for key, _ in keys}) == len(keys))  # else the packer refuses them
    stream = [{"url": "x", "stream": io.BytesIO(written(samples))}]
    found = wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(stream))
    assert list(found) == [
        {"__key__": key, "__url__": "x", extension.lower(): data, "cls": b"3"}
        for (key, extension), data in keys.items()
    ]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10026"),
        ("n1.0/a b/x.JPEG", "n1.0/a b/x"),  # dots in folders are harmless
        ("a/x.y.z.jpg", "a/x%2Ey%2Ez"),  # a key would end at the first dot
        ("a/%2E.jpg", "a/%252E"),  # a name that looks encoded
        ("__a__/x.jpg", "%5F_a__/x"),  # would be skipped as metadata
        ("a/__x__.jpg", "a/%5F_x__"),
        ("a/_x.jpg", "a/_x"),
        ("été/日本.jpg", "été/日本"),
    ],
)
def test_only_what_would_be_misread_is_encoded(path: str, key: str) -> None:
    """Ordinary names stay as they are; dots in the stem, % and a leading __ are encoded."""
    assert tar.member_name(path) == (key, path.rpartition(".")[2])
    assert tar.path_of(".".join(tar.member_name(path))) == path


def test_bytes_are_pinned() -> None:
    """The bytes of a tar never change: short, long and non-ASCII names, and padding."""
    samples = {"a/x.jpg": b"1" * 512, f"b/{'y' * 98}.png": b"", "é/z.webp": b"3" * 513}
    assert xxhash.xxh3_128_hexdigest(written(samples)) == "ce1cfd19403e0c034dacd8d1650b8aca"


def test_gnu_tar_extracts_long_names(tmp_path: Path) -> None:
    """GNU tar extracts names around its limit of 100 bytes and far above it, byte for byte."""
    samples = {f"{'d' * 50}/{n:0>{n - 55}}.jpg": b"%d" % n for n in (99, 100, 101, 300)}
    samples[f"{'d' * 200}/{'é' * 100}/x.jpg"] = b"1"
    subprocess.run(["tar", "xf", "-"], input=written(samples), cwd=tmp_path, check=True)
    assert {path: (tmp_path / path).read_bytes() for path in samples} == samples


def test_largest_sample() -> None:
    """A size that the index's 32 bits cannot hold is refused, the last one that fits is not."""
    last = tar.header("a.jpg", 2**32 - 1)
    assert tarfile.TarInfo.frombuf(last, "utf-8", "strict").size == 2**32 - 1
    with pytest.raises(ValueError, match="4294967296 bytes"):
        tar.header("a.jpg", 2**32)
