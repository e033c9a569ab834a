"""Several nodes as network namespaces of this machine, with a link between them; torchrun on each.

make test-cluster
"""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from scripts import chaos
from scripts.chaos_nodes import two_nodes
from scripts.chaos_run import differences, ended_well

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces take root, and the command ip",
    ),
]


def test_two_nodes_train_as_two_devices_do_and_end_when_cut_off(tmp_path: Path) -> None:
    """The same samples and weights; the link down: all end in time, both sides named, and go on."""
    steps = chaos.prepare(tmp_path)
    scene = chaos.Scene(folder=tmp_path / "nodes")
    with two_nodes() as nodes, ExitStack() as stack:
        for training in chaos.start_on(nodes, scene, stack):
            ended_well(training)
    assert differences(scene.folder, tmp_path / "whole") == []
    right, row = chaos.cause("network", tmp_path, seed=2, steps=steps)
    assert right, row
