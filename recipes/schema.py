"""Reads a recipe: YAML with one `base:` parent each, strict keys, overrides from the command line.

Merging and type checks are OmegaConf's, on dataclasses that stand beside what they configure.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loaders.datamodule import DataConfig
from model.first_line import first_line
from model.guards import ExpectedConfig
from model.loggers import LoggingConfig
from model.loss import LossConfig
from model.lr_finder import FinderConfig
from model.mixup import MixConfig
from model.networks import NetworkConfig
from model.optim import OptimConfig
from model.schedule import ScheduleConfig
from model.trainer import TrainerConfig
from sharding.errors import UsageError

_RECIPES = Path(__file__).parent
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a training run."""

    name: str = "base"
    """Names the run's folder."""
    seed: int = 0
    """Of the weights, the order and the augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lr_finder: FinderConfig = field(default_factory=FinderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    expected: ExpectedConfig = field(default_factory=ExpectedConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must be in 0..2^32-1, got {self.seed}")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, its parents' values under its own, `section.key=value` over both.

    Raises UsageError for a missing file, bad YAML, an unknown key (with the nearest known one),
    a value of the wrong type or out of range.
    """
    merged = OmegaConf.structured(Recipe)
    states = []
    for source, values in [*_with_parents(path), *map(_override, overrides)]:
        _check_keys(values, Recipe, source)
        try:
            OmegaConf.set_readonly(merged, False)
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            raise UsageError(f"{source}: {_misfit(error, values)}") from error
        assert isinstance(merged, DictConfig)
        states.append((source, merged))
    try:
        recipe = OmegaConf.to_object(merged)
    except (ValueError, TypeError, OmegaConfBaseException) as error:
        raise UsageError(_blame(states, error)) from error
    assert isinstance(recipe, Recipe)
    return recipe


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, for YAML and for checkpoints."""
    return dataclasses.asdict(recipe)


def _blame(states: Sequence[tuple[str, DictConfig]], error: Exception) -> str:
    """What is wrong with the merged values, after the source that made it so.

    states: each source, with the values merged up to it, which need not fit before the last one.
    Of those after which the section never fitted again, the first that has the fault is to blame.
    """
    faults = _faults(states[-1][1])
    if not faults:  # of several sections together
        return f"{states[-1][0]}: {first_line(error)}"
    section, fault = next(iter(faults.items()))
    source = states[-1][0]
    for earlier, values in reversed(states):
        found = _faults(values).get(section)
        if found is None:
            break
        if found == fault:
            source = earlier
    return f"{source}: {section}: {fault}" if section else f"{source}: {fault}"


def _faults(values: DictConfig, section: str = "") -> dict[str, str]:
    """What each section says of its own values, without those of the sections in it."""
    found: dict[str, str] = {}
    own: list[str] = []
    for key, value in values.items_ex(resolve=False):
        if isinstance(value, DictConfig):
            found |= _faults(value, f"{section}{'.' * bool(section)}{key!s}")
        else:
            own.append(str(key))
    try:
        kind = OmegaConf.get_type(values)
        assert kind is not None
        kind(**{key: OmegaConf.select(values, key) for key in own})
    except (ValueError, TypeError, OmegaConfBaseException) as error:
        found[section] = first_line(error)
    return found


def _misfit(error: OmegaConfBaseException, values: Mapping[str, Any]) -> str:
    """What a value has to be and is not; in OmegaConf's words where it stands in a list."""
    kind: Any = Recipe
    value: Any = values
    for key in (parts := str(error.full_key).split(".")):
        kind = get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
        value = value.get(key) if isinstance(value, Mapping) else None
    kinds = [_KINDS.get(part, "") for part in get_args(kind) or (kind,) if part is not NoneType]
    if not parts or not all(kinds):
        return f"{first_line(error)} ({error.full_key})"
    got = "nothing" if value is None else repr(value)
    return f"{error.full_key} must be {' or '.join(kinds)}, got {got}"


def _with_parents(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file, values) of the recipe and all its parents, the eldest first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    while path not in [Path(source) for source, _ in chain]:
        values = _read(path)
        parent = values.pop("base", None)
        chain.insert(0, (str(path), values))
        if parent is None:
            return chain
        path = path.parent / str(parent)
    raise UsageError(f"{path}: recipes are each other's base: {', '.join(s for s, _ in chain)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (FileNotFoundError, IsADirectoryError) as error:
        known = {one.stem: one for place in (_RECIPES, path.parent) for one in place.glob("*.yaml")}
        near = difflib.get_close_matches(path.stem, known, 1)
        advice = f"; did you mean {known[near[0]]}?" if near else ""
        raise UsageError(f"there is no recipe {path}{advice}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} is no recipe: it has to hold sections like 'data:'")
    return values


def _override(text: str) -> tuple[str, dict[str, Any]]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"{text!r} is no override; write section.key=value")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r}: the value is no YAML") from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return text, nested


def _check_keys(values: Mapping[Any, Any], kind: type, source: str, prefix: str = "") -> None:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            near = _elsewhere(str(key)) if not prefix else []
            near += [prefix + name for name in difflib.get_close_matches(str(key), fields, 1)]
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise UsageError(f"{source}: unknown key {prefix}{key}; {hint}")
        section = fields[key].default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            if not isinstance(value, Mapping):
                raise UsageError(f"{source}: {prefix}{key} is a section, it cannot be {value!r}")
            _check_keys(value, section, source, f"{prefix}{key}.")


def _elsewhere(key: str) -> list[str]:
    """Where a key stands that was given without its section."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(Recipe)}
    return [
        f"{section}.{key}"
        for section, kind in sections.items()
        if isinstance(kind, type) and key in {f.name for f in dataclasses.fields(kind)}
    ]
