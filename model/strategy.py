"""How several processes train together: Lightning's DDP, and what is said when they do not meet."""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from threading import Timer

import torch
from lightning.pytorch.strategies import DDPStrategy

from model.first_line import first_line

START_S = 300.0
"""Processes of a run have at least so long to come together."""
PATIENCE_S = 20.0
"""Then rank 0 says for what it waits."""
_PARENT = "SHARDSTREAM_PARENT"  # the process that starts the others of its node
_PR_SET_PDEATHSIG = 1


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
        if "LOCAL_RANK" not in os.environ:  # else torchrun, or the process meant here, started us
            os.environ[_PARENT] = str(os.getpid())
        super().__init__(
            broadcast_buffers=False,
            timeout=timedelta(seconds=max(timeout_s, START_S)),
            find_unused_parameters=world > 2 and (deterministic or not torch.cuda.is_available()),
        )

    def setup_distributed(self) -> None:
        """Meet the others. Raises ConnectionError, which says where and with whom.

        A process that another one has started ends with it while they have not met: nobody else
        would know of it. From then on that is Liveness's matter.
        """
        waiting = Timer(PATIENCE_S, self._say_waiting)
        waiting.daemon = True
        if self.global_rank == 0:
            waiting.start()
        parent = os.environ.get(_PARENT, str(os.getpid()))
        child = self.local_rank > 0 and parent != str(os.getpid())
        try:
            if child:
                _die_with_parent(signal.SIGKILL)
                if parent != str(os.getppid()):  # it has died before
                    sys.exit(1)
            super().setup_distributed()
            if child:
                _die_with_parent(0)
        except RuntimeError as error:  # DistNetworkError, DistStoreError, and gloo's plain ones
            what = first_line(error).rstrip(".")
            raise ConnectionError(
                f"rank {self.global_rank} of {self.world_size} could not meet the others at "
                f"{_place()} ({what}). Were all started, with the same --nodes and --devices? Is "
                "it the first node's address, can all reach it, is the port free? `train.py "
                "--doctor` tries it"
            ) from error
        finally:
            waiting.cancel()

    def _say_waiting(self) -> None:
        print(
            f"rank 0 of {self.world_size} waits at {_place()} for the others: were all started?",
            file=sys.stderr,
            flush=True,
        )


def _place() -> str:
    """Where the processes meet."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _die_with_parent(name: int) -> None:
    """The signal that the system sends us at our parent's end; 0: none.

    As sharding/process.py has it for workers, of which this package knows nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, name)
