"""Randomness of a training step from its identity, never from what was drawn before."""

import hashlib
import struct


def step_seed(*, seed: int, step: int, micro: int, rank: int) -> int:
    """The seed of what a rank draws for one batch: mixup, dropout, stochastic depth.

    Of a hash, because generators take similar seeds and sums of them for granted: step 1 of rank 0
    shall have nothing of step 0 of rank 1. micro: the batch's number within the optimizer step.
    A resumed run draws the same, on the same number of processes.
    """
    identity = struct.pack("<4q", seed, step, micro, rank)
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little")
