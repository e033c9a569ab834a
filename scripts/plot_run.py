#!/usr/bin/env python3
"""Draw runs on one sheet: loss, accuracy, learning rate, images/s and waiting for data.

All comes from the runs' CSV files. Of one run each metric has a colour; of several each run has
one, and the metrics differ in their dashes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from scripts.view_logs import ACCURACY, DATA, LOSS, RATE, draw, read_metrics
from sharding.console import picture
from sharding.errors import UsageError, reports_errors

EXAMPLES = """examples:
  python scripts/plot_run.py runs/base
  python scripts/plot_run.py runs/base runs/rsb_a2 --out compared.png
"""
PANELS = (LOSS, ACCURACY, RATE, *DATA)


def run_names(runs: Sequence[Path]) -> list[str]:
    """PURE but for links: the folders' names; whole paths where two have the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out",
        type=picture,
        metavar="PNG",
        help="the sheet (default: curves.png in the first run)",
    )
    options = parser.parse_args(arguments)
    runs = dict(zip(run_names(options.runs), map(read_metrics, options.runs), strict=True))
    out = options.out or options.runs[0] / "curves.png"
    if not draw(runs, PANELS, out):
        raise UsageError(f"{', '.join(runs)}: nothing that can be drawn was logged yet")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
