"""The arguments of packing: their defaults are the library's, and their values are checked."""

import argparse

from sharding.arguments import add_pack
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
