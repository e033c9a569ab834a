"""train.py's command line: flags stand for values of the recipe."""

import pytest

from recipes.options import FLAGS, train_options


def test_flags_come_before_what_is_written_out() -> None:
    """So `section.key=value` has the last word, wherever on the line it stands."""
    line = "--config r.yaml trainer.epochs=3 --epochs 5 --lr 0.1 optim.momentum=0.8"
    options = train_options(None, line.split())
    assert options.overrides == [
        "trainer.epochs=5",
        "optim.lr=0.1",
        "trainer.epochs=3",
        "optim.momentum=0.8",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", []),
        ("--no_wandb", ["logging.wandb=false"]),
        ("--wandb_name n", ["logging.wandb_name=n", "logging.wandb=true"]),
        ("--wandb_project p --no_wandb", ["logging.wandb_project=p", "logging.wandb=false"]),
    ],
)
def test_who_names_a_wandb_run_wants_one(line: str, expected: list[str]) -> None:
    """Unless it is switched off, which is the stronger word."""
    assert train_options(None, f"--config r.yaml {line}".split()).overrides == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("recipes/demo.yaml --epochs 1", "error: did you mean --config recipes/demo.yaml?"),
        ("--epochs 1", "error: --config is missing: it names a recipe"),
    ],
)
def test_a_recipe_has_to_be_named(
    capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    """By its option; who leaves that out is told."""
    with pytest.raises(SystemExit) as caught:
        train_options(None, line.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_nothing_typed_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    """With examples."""
    with pytest.raises(SystemExit) as caught:
        train_options("Train.", [])
    assert caught.value.code == 2
    assert "python train.py --config recipes/demo.yaml" in capsys.readouterr().err


def test_help_names_every_flag_and_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    """What a flag stands for can be read there."""
    with pytest.raises(SystemExit):
        train_options("Train.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag, key in FLAGS.items():
        assert f"--{flag}" in text
        assert f"short for {key}=X" in text
