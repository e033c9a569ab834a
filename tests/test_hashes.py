"""model/hashes.py: what a file of hashes says, and what a checkpoint is found to be."""

from pathlib import Path

import pytest
import torch

from model.hashes import (
    BrokenCheckpointError,
    Content,
    Hashing,
    check,
    content_of,
    from_bytes,
    hashes_path,
    matching,
    read_hashes,
    step_in,
    to_bytes,
)

A, B = Content("a" * 32, 10, 5), Content("b" * 32, 20)


def test_contents_come_back() -> None:
    """In order, each once; a step that is not known stays so."""
    found = from_bytes(to_bytes([A, B, A]))
    assert [str(content) for content in found] == [str(A), str(B)]
    assert [content.step for content in found] == [5, None]


@pytest.mark.parametrize(
    "torn",
    [b"", b"\0" * 50, b"aaaa", to_bytes([A])[:20], f"{'A' * 32} 1\n".encode(), b"\xff\xfe 1 2\n"],
)
def test_torn_lines_say_nothing(torn: bytes) -> None:
    """A line that is not whole is no content; the others count."""
    assert from_bytes(torn) == ()
    assert from_bytes(torn + b"\n" + to_bytes([B])) == (B,)


def test_the_step_is_no_part_of_what_a_file_holds() -> None:
    """What was found in a file has none; it is taken from what is known."""
    found = Content(A.digest, A.size)
    assert matching([B, A], found, where="x").step == 5
    with pytest.raises(BrokenCheckpointError, match=f"x was damaged: it has {'b' * 32} 20"):
        matching([A], B, where="x")


def test_hashing_passes_on_what_it_hashes(tmp_path: Path) -> None:
    """The same content whether it is written in pieces or read back."""
    path = tmp_path / "file"
    with path.open("wb") as stream:
        hashing = Hashing(stream)
        assert hashing.write(b"abc") + hashing.write(torch.arange(3).numpy()) == 27
        hashing.flush()
        assert path.stat().st_size == 27
    assert hashing.content(7) == content_of(path)
    assert hashing.content(7).step == 7


@pytest.mark.parametrize("hashes", [None, b"", b"torn"])
def test_without_hashes_the_sums_inside_decide(tmp_path: Path, hashes: bytes | None) -> None:
    """A checkpoint from elsewhere, or whose file of hashes was lost or torn, is taken if whole."""
    path = tmp_path / "a.ckpt"
    torch.save({"global_step": 3, "x": torch.arange(1000)}, path)
    if hashes is not None:
        hashes_path(path).write_bytes(hashes)
    assert read_hashes(path) == ()
    assert check(path) == content_of(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenCheckpointError, match=r"a\.ckpt was damaged"):
        check(path)


def test_a_missing_file_is_no_broken_one(tmp_path: Path) -> None:
    """Whoever looks at several takes the next."""
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError):
        step_in(tmp_path / "a.ckpt")


def test_the_step_inside(tmp_path: Path) -> None:
    """Of a Lightning checkpoint; -1 where there is none; broken where it cannot be loaded."""
    path = tmp_path / "a.ckpt"
    for checkpoint, step in (({"global_step": 3}, 3), ({"weights": 1}, -1), ([1], -1)):
        torch.save(checkpoint, path)
        assert step_in(path) == step
    path.write_bytes(b"rubbish")
    with pytest.raises(BrokenCheckpointError, match="cannot be loaded"):
        step_in(path)
