"""The command line of train.py."""

import argparse
import sys
from pathlib import Path

from sharding.console import picture
from sharding.store import local_path

EXAMPLES = """examples:
  python train.py --config recipes/demo.yaml
  python train.py --config recipes/base.yaml data.root=/fsx/imagenet-shards --devices 8
  python train.py --config recipes/base.yaml --resume auto
  python train.py --config recipes/base.yaml --global_batch_size 256 --devices 4 --resume auto
  python train.py --config recipes/tiny.yaml trainer.fast_dev_run=true
  python train.py --config recipes/base.yaml --plot_lr schedule.png
  python train.py --config recipes/base.yaml --find_lr
  python train.py --config recipes/base.yaml --doctor

The global batch is batch_size x devices x nodes x accumulate. It has to stay the same when a run
is resumed, on however many devices: state it with --global_batch_size, and accumulate follows.
"""
# A flag that users know, and the recipe's key that it sets.
FLAGS = {
    "epochs": "trainer.epochs",
    "devices": "trainer.devices",
    "nodes": "trainer.nodes",
    "batch_size": "trainer.batch_size",
    "global_batch_size": "trainer.global_batch_size",
    "lr": "optim.lr",
    "num_workers": "data.num_workers",
    "precision": "trainer.precision",
    "checkpoint_url": "trainer.checkpoint_url",
    "wandb_project": "logging.wandb_project",
    "wandb_name": "logging.wandb_name",
}


def train_options(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """What was typed; flags that stand for a value of the recipe are put before `overrides`.

    description: of the program, for --help. arguments: None: those of the process.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="the recipe (required)")
    parser.add_argument(
        "--resume",
        metavar="PATH|URL|auto",
        help="checkpoint to go on from; auto: the newest of the run's folder and checkpoint_url",
    )
    parser.add_argument(
        "--run",
        type=local_path,
        metavar="FOLDER",
        help="for all output (default: runs/ and the recipe's name)",
    )
    parser.add_argument(
        "--find_lr", action="store_true", help="find a learning rate, and do not train"
    )
    parser.add_argument(
        "--plot_lr", type=picture, metavar="PNG", help="draw the schedule, and do not train"
    )
    parser.add_argument(
        "--doctor", action="store_true", help="check what the run needs here, and do not train"
    )
    parser.add_argument("--no_wandb", action="store_true", help="short for logging.wandb=false")
    for flag, key in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="X", help=f"short for {key}=X")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any value of the recipe"
    )
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.error(f"what shall be trained? Give a recipe\n\n{EXAMPLES}")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None:
        named = next((word for word in options.overrides if word.endswith((".yaml", ".yml"))), None)
        parser.error(
            f"did you mean --config {named}?" if named else "--config is missing: it names a recipe"
        )
    flags = {key: getattr(options, flag) for flag, key in FLAGS.items()}
    if options.wandb_project or options.wandb_name:
        flags["logging.wandb"] = "true"
    if options.no_wandb:
        flags["logging.wandb"] = "false"
    options.overrides[:0] = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return options
