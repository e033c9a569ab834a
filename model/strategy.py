"""How several processes train together: Lightning's DDP, and what is said when they do not meet."""

import os
from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy

from model.first_line import first_line

START_S = 300.0
"""Processes of a run have at least so long to come together."""


class DDP(DDPStrategy):
    """Lightning's, as a run here needs it.

    Without the broadcast of buffers: see Classifier.on_validation_epoch_start. Where results are to
    be the same to the bit, gradients keep the buckets that they have at first: by default DDP
    arranges them anew after a process's first step, so a resumed run of more than two processes
    would add them up in another order there. What switches that off is the search for parameters
    without a gradient, which takes a moment at each step, and a line of warning at the first.
    """

    def __init__(self, *, world: int, timeout_s: float, deterministic: bool) -> None:
        """timeout_s: of a collective; Liveness sets it once all have come together."""
        super().__init__(
            broadcast_buffers=False,
            timeout=timedelta(seconds=max(timeout_s, START_S)),
            find_unused_parameters=world > 2 and (deterministic or not torch.cuda.is_available()),
        )

    def setup_distributed(self) -> None:
        """Meet the others. Raises ConnectionError, which says where and with whom."""
        try:
            super().setup_distributed()
        except RuntimeError as error:  # DistNetworkError, DistStoreError, and gloo's plain ones
            environ = os.environ
            place = f"{environ.get('MASTER_ADDR', '?')}:{environ.get('MASTER_PORT', '?')}"
            what = first_line(error).rstrip(".")
            raise ConnectionError(
                f"rank {self.global_rank} of {self.world_size} could not meet the others at "
                f"{place} ({what}). Were all started, with the same --nodes and --devices? Is it "
                "the first node's address, can all reach it, is the port free? `train.py --doctor` "
                "tries it"
            ) from error
