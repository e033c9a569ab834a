"""PURE: how large training images are, epoch by epoch (progressive resizing)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressiveConfig:
    """From `start_size` up to start_epoch, linearly to the training size at end_epoch."""

    start_size: int | None = None
    """Pixels of a side; null: the training size from the first epoch on."""
    start_epoch: int = 0
    end_epoch: int = 0
    multiple: int = 32
    """Sizes in between are rounded to multiples of this. Each size is compiled once."""

    def __post_init__(self) -> None:
        if self.start_size is not None and self.start_size < 1:
            raise ValueError(f"start_size must be at least 1, got {self.start_size}")
        if not 0 <= self.start_epoch <= self.end_epoch or self.multiple < 1:
            raise ValueError(
                "start_epoch must be in 0..end_epoch and multiple at least 1, got "
                f"{self.start_epoch}, {self.end_epoch} and {self.multiple}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Pixels of a training image's side, by epoch (from 0)."""

    size: int
    progressive: ProgressiveConfig = ProgressiveConfig()

    @property
    def largest(self) -> int:
        """Of all epochs."""
        return max(self.size, self.progressive.start_size or 0)

    def at(self, epoch: int) -> int:
        """The size in this epoch."""
        config = self.progressive
        if config.start_size is None or epoch >= config.end_epoch:
            return self.size
        if epoch <= config.start_epoch:
            return config.start_size
        part = (epoch - config.start_epoch) / (config.end_epoch - config.start_epoch)
        between = config.start_size + part * (self.size - config.start_size)
        rounded = max(round(between / config.multiple), 1) * config.multiple
        return min(rounded, self.largest)  # for which there is memory
