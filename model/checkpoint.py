"""Checkpoints on disk: written whole or not at all, loaded without running code."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

LAST = "last.ckpt"

AtomicFile = Callable[[Path], AbstractContextManager[BinaryIO]]
"""Opens a file that appears whole when its block ends well, or not at all."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint by a whole new one, or leaves it as it was.

    Lightning's own goes through the system's temporary folder; when that is on another file system,
    a full disk destroys the checkpoint that it was about to replace.
    """

    def __init__(self, atomic_file: AtomicFile) -> None:
        self._atomic_file = atomic_file

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the checkpoint."""
        with self._atomic_file(Path(path)) as stream:
            torch.save(checkpoint, stream)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors and plain values only: a checkpoint from elsewhere cannot run code."""
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return checkpoint
