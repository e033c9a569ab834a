"""Reads a recipe: YAML with one `base:` parent each, strict keys, overrides from the command line.

Merging and type checks are OmegaConf's, on dataclasses that stand beside what they configure.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args, get_origin, get_type_hints

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
_KINDS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
}


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
        except (OmegaConfBaseException, TypeError) as error:
            raise UsageError(f"{source}: {_misfit(values, error)}") from error
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


def _misfit(values: Mapping[str, Any], error: Exception) -> str:
    """Which value does not fit, what it has to be, and what it is; else what OmegaConf says."""
    for key, value, kind in _leaves(values, Recipe):
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        try:
            OmegaConf.merge(OmegaConf.structured(Recipe), nested)
        except (OmegaConfBaseException, TypeError):  # this is the one; said in our words
            got = "nothing" if value is None else repr(value)
            return f"{key} must be {_words(kind)}, got {got}"
    return first_line(error)


def _leaves(
    values: Mapping[str, Any], kind: type, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Key, value and type of each value of the sections."""
    for key, value in values.items():
        of_value = get_type_hints(kind)[key]
        if dataclasses.is_dataclass(of_value):
            yield from _leaves(value, cast("type", of_value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value, of_value


def _words(kind: Any, many: bool = False) -> str:
    """A type in words: tuple[float, float] -> 'a list of 2 numbers', int | None -> 'an integer'."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    if kind in _KINDS:
        return _KINDS[kind][many]
    if get_origin(kind) in {list, tuple}:
        fixed = get_origin(kind) is tuple and parts[-1] is not Ellipsis
        number = f"{len(parts)} " if fixed else ""
        return f"{'lists' if many else 'a list'} of {number}{_words(parts[0], many=True)}"
    return " or ".join(_words(part) for part in parts)


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
            near = [prefix + name for name in difflib.get_close_matches(str(key), fields, 1)]
            near += _elsewhere(str(key))
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise UsageError(f"{source}: unknown key {prefix}{key}; {hint}")
        section = fields[key].default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            if not isinstance(value, Mapping):
                raise UsageError(f"{source}: {prefix}{key} is a section, it cannot be {value!r}")
            _check_keys(value, section, source, f"{prefix}{key}.")


def _elsewhere(key: str, kind: type = Recipe, prefix: str = "") -> Iterator[str]:
    """Where a key stands that was given in another section, or in none."""
    for name, of_value in get_type_hints(kind).items():
        if dataclasses.is_dataclass(of_value):
            yield from _elsewhere(key, cast("type", of_value), f"{prefix}{name}.")
        elif name == key:
            yield prefix + name
