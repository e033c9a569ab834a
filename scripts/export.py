#!/usr/bin/env python3
"""Write a checkpoint's network as ONNX, or as torch.export does, for use without this project.

The file takes normalized images and says itself how they are made: class names, size, resize,
interpolation, mean, standard deviation and order of channels stand in it, as metadata_props of the
ONNX model or as model.json in the .pt2 archive. Before anything is written, the exported network is
run on validation images that were prepared by these words alone, and its logits are compared with
the checkpoint's.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch

sys.path.append(str(Path(__file__).parents[1]))

from eval import load_weights, new_model
from loaders.datamodule import ImageNetData
from loaders.pipeline import Batch
from model.classifier import MEAN, STD
from recipes.schema import Recipe, load_recipe
from sharding.console import positive
from sharding.errors import DataError, UsageError, reports_errors
from sharding.store import atomic_file

EXAMPLES = """examples:
  python scripts/export.py --config recipes/base.yaml --checkpoint last.ckpt model.onnx
  python scripts/export.py --config recipes/base.yaml --checkpoint last.ckpt model.pt2 --weights raw
"""
CARD = "model.json"
Card = dict[str, Any]


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Export, compare, write."""
    options = _options(arguments)
    overrides = [*options.overrides, "data.num_workers=0"]
    overrides += ["model.compile=false", "model.sync_bn=false"]  # neither is for a file
    recipe = load_recipe(options.config, overrides)
    if options.out.suffix not in {".onnx", ".pt2"}:
        raise UsageError(f"{options.out}: the name has to end in .onnx or .pt2")
    if not options.checkpoint.is_file():
        raise UsageError(f"there is no checkpoint {options.checkpoint}")
    data = ImageNetData(recipe.data, seed=recipe.seed, batch_size=options.images)
    model = new_model(recipe, len(data.val.classes))
    weights = load_weights(model, options.checkpoint, options.weights)
    model.eval().to(memory_format=torch.contiguous_format)
    card = make_card(recipe, data.val.classes, weights)
    batch = _first_batch(data)
    with torch.no_grad():
        expected = model(batch.images)
    program = _program(model.network, recipe.data.val_size)
    content = as_onnx(program, card) if options.out.suffix == ".onnx" else as_pt2(program, card)
    compare(run_exported(content, options.out.suffix, batch), expected, options.tolerance)
    with atomic_file(options.out) as stream:
        stream.write(content)
    print(f"{options.out}: {len(content) / 1e6:.1f} MB, {weights} weights")
    return 0


def make_card(recipe: Recipe, classes: tuple[str, ...], weights: str) -> Card:
    """What a user of the file has to know. mean and std are of pixels that were divided by 255."""
    return {
        "network": recipe.model.name,
        "recipe": recipe.name,
        "weights": weights,
        "resize": recipe.data.val_resize,
        "size": recipe.data.val_size,
        "interpolation": recipe.data.val_interpolation,
        "channels": "RGB",
        "layout": "NCHW",
        "mean": [value / 255 for value in MEAN],
        "std": [value / 255 for value in STD],
        "classes": list(classes),
    }


def prepare(images: torch.Tensor, card: Card) -> torch.Tensor:
    """(N, H, W, 3) uint8 RGB -> the (N, 3, H, W) float32 that the card asks for."""
    assert (card["channels"], card["layout"]) == ("RGB", "NCHW")
    pixels = (images / 255 - torch.tensor(card["mean"])) / torch.tensor(card["std"])
    return pixels.permute(0, 3, 1, 2).contiguous()


def as_pt2(program: torch.export.ExportedProgram, card: Card) -> bytes:
    """The archive that torch.export.load reads."""
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={CARD: json.dumps(card)})
    return stream.getvalue()


def as_onnx(program: torch.export.ExportedProgram, card: Card) -> bytes:
    """The model that any ONNX runtime reads; each value of the card is JSON."""
    try:
        import onnx  # noqa: PLC0415  (optional)
        import onnxruntime  # noqa: F401, PLC0415  (will be needed)
        import onnxscript  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed; pip install 'shardstream[export]'"
        ) from error
    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
    )
    assert exported is not None
    model = exported.model_proto
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in card.items()})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def read_card(path: Path) -> Card:
    """The card of a file that this program wrote."""
    if path.suffix == ".onnx":
        import onnx  # noqa: PLC0415  (optional)

        model = onnx.load(path, load_external_data=False)
        return {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    extra = {CARD: ""}
    torch.export.load(path, extra_files=extra)
    card: Card = json.loads(extra[CARD])
    return card


def run_exported(content: bytes, suffix: str, batch: Batch) -> torch.Tensor:
    """Logits of a batch, by nothing but the file; the first image once more, alone."""
    if suffix == ".onnx":
        import onnxruntime  # noqa: PLC0415  (optional)

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        properties = session.get_modelmeta().custom_metadata_map
        images = prepare(batch.images, {key: json.loads(v) for key, v in properties.items()})
        parts = [session.run(None, {"images": x.numpy()})[0] for x in (images[:1], images)]
        return torch.cat([torch.from_numpy(part) for part in parts])
    extra = {CARD: ""}
    network = torch.export.load(io.BytesIO(content), extra_files=extra).module()
    images = prepare(batch.images, json.loads(extra[CARD]))
    with torch.no_grad():
        return torch.cat([network(images[:1]), network(images)])


def compare(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Print how far the logits are apart. Raises DataError if that is more than the tolerance."""
    difference = float((found - torch.cat([expected[:1], expected])).abs().max())
    text = (
        f"largest difference of a logit over {len(expected)} validation images: {difference:.2g}, "
        f"of logits up to {float(expected.abs().max()):.2g}"
    )
    if not difference <= tolerance:  # so that NaN fails, too
        raise DataError(f"{text}; more than {tolerance:g}, nothing was written")
    print(text)


def _program(network: torch.nn.Module, size: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    example = torch.zeros(2, 3, size, size)
    return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def _first_batch(data: ImageNetData) -> Batch:
    """Of the validation images, prepared as validation does it."""
    data.trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return next(iter(data.val_dataloader()))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="FILE", help="ending in .onnx or .pt2")
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the recipe")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH")
    parser.add_argument(
        "--weights", choices=("best", "raw", "ema"), default="best", help="as for eval.py"
    )
    parser.add_argument("--images", type=positive, default=8, help="to compare on (%(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="most that a logit may differ (%(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
