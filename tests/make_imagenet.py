"""A flat validation split as ImageNet's archives have it, and the files with its labels."""

from collections.abc import Mapping
from pathlib import Path

from tests.make_images import write_files

KAGGLE = "ILSVRC/Data/CLS-LOC"
CSV = "LOC_val_solution.csv"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# The first classes of the real table; by name they sort the other way round.
CLASSES = {1: "n02119789", 2: "n02100735", 1000: "n03255030"}
TABLE = "n02119789 1 kit_fox\nn02100735 2 English_setter\nn03255030 1000 dumbbell\n"
LABELS = (2, 1000, 1, 2)
SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"{name},{boxes}\n"
    for name, boxes in (
        ("ILSVRC2012_val_00000003", "n02119789 0 14 216 299 "),  # in any order
        ("ILSVRC2012_val_00000001", "n02100735 85 1 499 272 n02100735 131 0 499 254 "),
        ("ILSVRC2012_val_00000004", "n02100735 1 2 3 4"),
        ("ILSVRC2012_val_00000002", "n03255030 97 20 300 90 "),
    )
)
GROUND_TRUTH = "".join(f"{label}\n" for label in LABELS)


def image_name(number: int) -> str:
    """File name of a validation image."""
    return f"ILSVRC2012_val_{number:08d}.JPEG"


IMAGES = {image_name(i): b"%d" % i for i in range(1, len(LABELS) + 1)}
EXPECTED = {image_name(i): CLASSES[label] for i, label in enumerate(LABELS, 1)}


def flat(root: Path, files: Mapping[str, str | bytes], val: str = "val") -> Path:
    """A data set whose val is flat, and files beside it."""
    write_files(root / val, IMAGES)
    data = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    return write_files(root, data)
