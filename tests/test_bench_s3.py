"""bench_s3: the figures and verdicts, and ours from the server and behind a slow wire."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.stats import Counters
from scripts import bench_s3
from scripts.bench_s3 import Round, fastest, summarize, table
from scripts.bench_s3_peers import Epoch
from scripts.bench_s3_server import Meter, Server
from scripts.bench_s3_slow import Slow, slow_line
from sharding.s3 import S3Store
from tests.fault_proxy import BUCKET


def epoch(rate: float, *, read_s: float = 0.0, decode_s: float = 0.0) -> Epoch:
    """Ten seconds of an epoch, whose images have 1 MB each."""
    counters = Counters(read_s=read_s, decode_s=decode_s, read_bytes=1e7 * rate)
    return Epoch(
        images=int(10 * rate),
        seconds=10.0,
        all_images=int(12 * rate),
        all_seconds=12.5,
        first_seconds=0.5,
        counters=counters._asdict(),
    )


def test_ours_must_be_the_fastest_in_both_epochs() -> None:
    """Against the best peer's medians; one that has no cache has the same rate in both."""
    rates = {"ours": (300, 400), "webdataset": (310, 305), "mosaic": (100, 390)}
    rounds = [
        Round(contender=name, first=epoch(first), second=epoch(second), server_cpu=1.2)
        for name, (first, second) in rates.items()
    ]
    rows = summarize(rounds)
    assert [(row["contender"], row["epoch"]) for row in rows] == [
        ("ours", "first"),
        ("ours", "second"),
        ("webdataset", "first"),
        ("mosaic", "first"),
        ("mosaic", "second"),
    ]
    assert fastest(rows) == {
        "ours the fastest in the first epoch": "missed (0.97 x webdataset)",
        "ours the fastest in the second epoch": "kept (1.03 x mosaic)",
    }
    text = table(rows, {"litdata": "scripts/bench_setup.sh litdata installs it"})
    assert "LitData: missing: scripts/bench_setup.sh litdata installs it" in text


@pytest.mark.parametrize(("read_s", "verdict"), [(10.9, "kept (54.5%)"), (11.1, "missed (55.5%)")])
def test_workers_wait_no_longer_than_the_wire_makes_them(read_s: float, verdict: str) -> None:
    """8 s of wire, 3 s of decoding by two workers, in 10 s: they may wait half of it, and 5%."""
    slow = Slow(
        nodes=1,
        epochs=[epoch(80, read_s=read_s, decode_s=6.0)],
        workers=2,
        bytes_per_s=1e8,
        data_bytes=1000,
        read_bytes=1051,
        second_requests=0,
        second_rates=[500.0],
    )
    line, found = slow_line(1, [slow])
    assert "wire time 8.00 s, decode time 3.00 s" in line
    assert list(found.values()) == [verdict, "kept (0)", "missed (1.051 x)"]
    assert "= 55.0%" in next(iter(found))


def test_a_meter_counts_what_goes_through(tmp_path: Path) -> None:
    """Each answer's bytes and each request for an object, in time."""
    server = Server(None)
    (tmp_path / "a").write_bytes(bytes(100_000))
    server.upload(tmp_path, "metered")
    try:
        meter = Meter(server.endpoint)
        with meter:
            store = S3Store(f"s3://{BUCKET}/metered", endpoint=meter.url)
            assert store.open("a").read_at(5, 1000) == bytes(1000)
            assert sum(size for _, size in meter.sent) == 1000
            assert meter.reads() == 1
            assert len(meter.asked) == 2  # with the HEAD of open
            meter.settle()
    finally:
        server.clear()


def test_ours_is_measured_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos are packed and put on moto; each figure that must hold has its verdict."""
    monkeypatch.setattr(bench_s3, "NODES", (2,))
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    out = tmp_path / "out.json"
    arguments = f"--images {tmp_path} --count 160 --batch 8 --rounds 1 --workers 1 --peers none"
    assert bench_s3.main([*arguments.split(), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "The server is moto, in Python on the same" in printed
    found = json.loads(out.read_text())
    assert {one["contender"] for one in found["rounds"]} == {"ours", "ours-direct"}
    assert len(found["must_hold"]) == 3
    assert found["must_hold"]["2 nodes: no request to the store in the second epoch"] == "kept (0)"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "give --images FOLDER"),
        ("--images . --peers fast", "--peers: fast? There are webdataset, mosaic, litdata"),
        ("--images . --batch 6", "must be divisible by 4"),
        ("--images . --count 100", "--workers and --batch ask for"),
    ],
)
def test_wrong_use_is_found_before_the_packing(
    arguments: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit status 2."""
    assert bench_s3.main(arguments.split()) == 2
    assert text in capsys.readouterr().err
