"""export.py: what stands in the file, read by plain onnx and torch; and the check before it."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import eval as evaluation
from model.classifier import MEAN, STD
from recipes.schema import load_recipe
from scripts import export


@pytest.fixture
def checkpoint(small_recipe: Path, tmp_path: Path) -> Path:
    """Random weights, with statistics of their own and a head that makes the logits spread."""
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    model = evaluation.new_model(load_recipe(small_recipe), 3)
    for buffer in model.network.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.3).add_(0.02 * torch.rand_like(buffer))
    model.network.fc.weight.mul_(30)  # type: ignore[operator, union-attr]
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    torch.set_grad_enabled(True)
    return path


def exported(small_recipe: Path, checkpoint: Path, name: str, *more: str) -> Path:
    """The file that export.py wrote."""
    path = checkpoint.with_name(name)
    line = ["--config", str(small_recipe), "--checkpoint", str(checkpoint), str(path), *more]
    assert export.main(line) == 0
    return path


def assert_card(card: export.Card) -> None:
    """The small recipe's preprocessing and classes."""
    assert card["classes"] == ["a", "b", "c"]
    assert (card["size"], card["resize"], card["interpolation"]) == (8, 8, "bilinear")
    assert (card["channels"], card["layout"], card["network"]) == ("RGB", "NCHW", "resnet10")
    assert card["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert card["std"] == pytest.approx([0.229, 0.224, 0.225])


def torchvision_input(small_images: Path, card: export.Card) -> torch.Tensor:
    """The first validation image as a stranger would prepare it by the card."""
    chain = v2.Compose(
        [
            v2.Resize(card["resize"], antialias=True),
            v2.CenterCrop(card["size"]),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(card["mean"], card["std"]),
        ]
    )
    with Image.open(small_images / "val" / "a" / "a_0.JPEG") as image:
        tensor: torch.Tensor = chain(image.convert("RGB"))[None]
    return tensor


def test_onnx_holds_classes_and_preprocessing(
    small_recipe: Path, small_images: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """metadata_props by plain onnx; batches of any size; a stranger's logits are those of .pt2."""
    path = exported(small_recipe, checkpoint, "model.onnx")
    assert "largest difference of a logit over 8 validation images: " in capsys.readouterr().out
    model = onnx.load(path)
    card = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert_card(card)
    assert export.read_card(path) == card
    (images,) = model.graph.input
    dims = images.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, 8, 8]
    other = exported(small_recipe, checkpoint, "model.pt2")
    extra = {"model.json": ""}
    program = torch.export.load(other, extra_files=extra)
    assert_card(json.loads(extra["model.json"]))
    assert export.read_card(other) == card
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    stranger = torchvision_input(small_images, card)
    for batch in (stranger, stranger.repeat(5, 1, 1, 1)):
        (logits,) = session.run(["logits"], {"images": batch.numpy()})
        assert logits.shape == (len(batch), 3)
        assert logits.std() > 0.1
        assert torch.allclose(torch.from_numpy(logits), program.module()(batch), atol=1e-4)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_a_file_that_differs_is_not_written(
    small_recipe: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """A card whose mean is off by one level changes the logits: exit status 3, and no file."""
    monkeypatch.setattr(export, "MEAN", tuple(value + 1 for value in MEAN))
    line = ["--config", str(small_recipe), "--checkpoint", str(checkpoint)]
    assert export.main([*line, str(checkpoint.with_name(name)), "--tolerance", "1e-4"]) == 3
    assert "more than 0.0001, nothing was written" in capsys.readouterr().err
    assert not checkpoint.with_name(name).exists()


def test_nan_is_a_difference() -> None:
    """Logits that are no numbers do not pass."""
    from sharding.errors import DataError  # noqa: PLC0415

    with pytest.raises(DataError, match="nan"):
        export.compare(torch.full((2, 3), torch.nan), torch.zeros(1, 3), 1.0)


def test_the_card_follows_the_recipe(small_recipe: Path) -> None:
    """Sizes, interpolation and weights; 255 times mean and std are training's."""
    recipe = load_recipe(small_recipe)
    data = replace(recipe.data, val_size=9, val_resize=11, val_interpolation="bicubic")
    card = export.make_card(replace(recipe, data=data), ("x",), "ema")
    assert (card["size"], card["resize"], card["interpolation"]) == (9, 11, "bicubic")
    assert card["weights"] == "ema"
    assert [value * 255 for value in card["mean"]] == pytest.approx(list(MEAN))
    assert [value * 255 for value in card["std"]] == pytest.approx(list(STD))


def test_another_ending_is_refused(
    small_recipe: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two that there are are named."""
    line = ["--config", str(small_recipe), "--checkpoint", str(checkpoint), "model.pth"]
    assert export.main(line) == 2
    assert "has to end in .onnx or .pt2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_networks_with_all_switches_can_be_exported(
    small_recipe: Path, tmp_path: Path, name: str
) -> None:
    """Blurred strides, stochastic depth and dropout; what is for training is off in the file."""
    switches = ["model.blurpool=true", "model.drop_path=0.5", "model.dropout=0.5"]
    model = evaluation.new_model(load_recipe(small_recipe, switches), 3)
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    assert exported(small_recipe, path, name, *switches, "data.val_size=32", "data.val_resize=32")
