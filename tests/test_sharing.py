"""model/sharing.py: ranks with disks of their own start from one checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import train as train_program
from model.checkpoint import LAST, AtomicCheckpointIO
from model.sharing import agree, among_ranks
from sharding.store import atomic_file
from tests.ports import free_port
from tests.runs import TRAIN

FILES = AtomicCheckpointIO(atomic_file)
ROOT = Path(__file__).parents[1]

RANK = """
import json, sys
from pathlib import Path
from torch import distributed
from model import sharing
from model.checkpoint import AtomicCheckpointIO
from model.hashes import BrokenCheckpointError
from sharding.store import atomic_file

sharing._PIECE = 1000  # so that there are several
distributed.init_process_group("gloo")
rank, told = distributed.get_rank(), []
for case in sorted(path for path in Path(sys.argv[1]).iterdir()):
    try:
        checkpoint = AtomicCheckpointIO(atomic_file).load_checkpoint(case / str(rank) / "last.ckpt")
        told.append([checkpoint["global_step"], int(checkpoint["x"].sum())])
    except BrokenCheckpointError as error:
        told.append(str(error))
for resumes in (True, rank == 1, False):
    try:
        sharing.SameStart(resumes=resumes).setup(None, None, "fit")
        told.append("")
    except sharing.DisagreementError as error:
        told.append(str(error))
distributed.destroy_process_group()
print(json.dumps(told))
"""


def put(path: Path, step: int) -> None:
    """A checkpoint of a step, with more than one piece of bytes."""
    FILES.save_checkpoint({"global_step": step, "x": torch.full((500,), step)}, path)


def test_all_ranks_load_the_newest_one_of_them_has(tmp_path: Path) -> None:
    """Whoever has it; one that is broken counts as none; where there is none, all are told."""
    cases: list[dict[int, int]] = [{0: 3, 1: 3}, {1: 5}, {0: 3, 1: 5}, {0: 7, 1: 5}, {}]
    for number, case in enumerate(cases):
        for rank, step in case.items():
            put(tmp_path / str(number) / str(rank) / LAST, step)
        (tmp_path / str(number)).mkdir(exist_ok=True)
    torn = tmp_path / "3" / "0" / LAST
    torn.write_bytes(torn.read_bytes()[:-1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path],
            env=os.environ | common | {"RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [json.loads(rank.communicate(timeout=100)[0].splitlines()[-1]) for rank in ranks]
    assert answers[0] == answers[1]
    loaded, starts = answers[0][:5], answers[0][5:]
    assert loaded[:4] == [[3, 1500], [5, 2500], [5, 2500], [5, 2500]]
    assert "No such file" in loaded[4]
    assert starts[0] == starts[2] == ""
    assert starts[1].startswith("only ranks 1 of 2 found a checkpoint; start all with torchrun")


def test_one_process_asks_nobody() -> None:
    """What it found is what it starts from."""
    assert not among_ranks()
    trainer: Any = SimpleNamespace(world_size=1)
    for path in (None, Path("a")):
        assert agree(trainer, path, name=Path("b")) == path


def train(
    recipe: Path, folders: list[Path], *options: str
) -> list[subprocess.CompletedProcess[str]]:
    """Train on nodes of one process each, in folders of their own, as torchrun starts them."""
    world, port = str(len(folders)), str(free_port())
    nodes = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        places = {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        environment = {
            **{name: str(value) for name, value in places.items()},
            "TORCHELASTIC_RUN_ID": "none",
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        size = [f"--nodes={world}", f"--batch_size={8 // len(folders)}"]
        nodes.append(
            subprocess.Popen(
                [*TRAIN, "--config", str(recipe), "--run=run", *size, *options],
                cwd=folder,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = []
    for node in nodes:
        out, errors = node.communicate(timeout=200)
        ended.append(subprocess.CompletedProcess(node.args, node.returncode, out, errors))
    return ended


def test_nodes_without_a_common_disk_go_on_together(small_recipe: Path, tmp_path: Path) -> None:
    """The first of two knows nothing of a run that the other one made alone: nothing is lost."""
    one, other = tmp_path / "one", tmp_path / "other"
    begun = ["--config", str(small_recipe), "--run", str(one / "run"), "--epochs=1"]
    assert train_program.main(begun) == 0
    ended = train(small_recipe, [other, one], "--epochs=2", "--resume=auto")
    for done in ended:
        assert done.returncode == 0, done.stderr
    assert "resuming from another rank" in ended[0].stdout
    last = torch.load(other / "run" / "checkpoints" / LAST, weights_only=True)
    assert last["global_step"] == 12
    for rank, node in enumerate((other, one)):
        lines = (node / "run" / f"samples-rank{rank}.jsonl").read_text().splitlines()
        assert len(lines) == 6
        assert json.loads(lines[0])["epoch"] == 1
