"""The arguments of packing: their defaults are the library's, and their values are checked."""

import argparse

import pytest

from sharding.arguments import add_pack, shard_size
from sharding.console import cores
from sharding.manifest import ImageRules, Packing


def parse(line: str) -> argparse.Namespace:
    """What the arguments of pack make of a line."""
    parser = argparse.ArgumentParser()
    add_pack(parser)
    return parser.parse_args(line.split())


def test_defaults_are_the_librarys() -> None:
    """Who types no option gets what who writes no argument gets."""
    options = parse("src dst")
    packing, rules = Packing(), ImageRules()
    assert (options.seed, options.shard_size, options.max_samples) == (
        packing.seed, packing.shard_bytes, packing.max_samples,
    )  # fmt: skip
    assert (
        ImageRules(
            check=options.check,
            on_bad=options.on_bad,
            max_pixels=options.max_pixels,
            resize=options.resize,
            quality=options.quality,
            transcode=options.transcode,
        )
        == rules
    )
    assert (options.workers, options.cluster, options.part) == (cores(), None, None)


def test_values_are_read() -> None:
    """Sizes with units, numbers, switches."""
    options = parse("s d --shard_size 2MB --resize 512 --quality 85 --transcode --workers 3")
    assert (options.shard_size, options.resize, options.quality) == (2_000_000, 512, 85)
    assert (options.transcode, options.workers) == (True, 3)


@pytest.mark.parametrize(("text", "size"), [("300B", 300), ("1000", 1000), ("0.3kB", 300)])
def test_shards_have_sizes_with_units(text: str, size: int) -> None:
    """A small number alone is taken for a slip."""
    assert parse(f"s d --shard_size {text}").shard_size == size
    with pytest.raises(argparse.ArgumentTypeError, match="write 300MB or, if bytes are meant, 300"):
        shard_size(" 300")
