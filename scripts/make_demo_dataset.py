#!/usr/bin/env python3
"""Write scikit-learn's handwritten digits as an ImageFolder of JPEGs: real data, no download.

1,797 digits of 8x8 pixels, enlarged; every fifth goes to val/.

  python scripts/make_demo_dataset.py data/digits
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from sharding.console import positive
from sharding.errors import UsageError, reports_errors


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Write the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="is made; must not hold anything yet")
    parser.add_argument("--size", type=positive, default=40, help="pixels of a side (default 40)")
    options = parser.parse_args(arguments)
    if options.folder.exists() and any(options.folder.iterdir()):
        raise UsageError(f"{options.folder} is not empty; choose another folder or remove it")
    digits = load_digits()
    counts = {"train": 0, "val": 0}
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if number % 5 == 4 else "train"
        counts[split] += 1
        image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        folder = options.folder / split / f"digit_{digit}"
        folder.mkdir(parents=True, exist_ok=True)
        image.resize((options.size, options.size), Image.Resampling.BICUBIC).save(
            folder / f"{number:04}.jpg", quality=95
        )
    print(f"{options.folder}: {counts['train']} training and {counts['val']} validation images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
