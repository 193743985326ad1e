"""The configurations a tunable may take: a frozen dataclass, the values of each field, one validity predicate."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeAlias, TypeVar

Value: TypeAlias = str | int | float | bool | None
Config = TypeVar("Config", bound=Hashable)


@dataclass(frozen=True)
class Space(Generic[Config]):
    """All valid configurations of one tunable, in a fixed order; the first is the default.

    Values are combined with the last field varying fastest, so the default is made of each field's first value
    (or is the first valid combination after it).

    >>> @dataclass(frozen=True)
    ... class Tile:
    ...     rows: int
    ...     warps: int
    >>> space = Space(Tile, {"rows": (64, 32, 128), "warps": (4, 8)}, lambda tile: tile.rows >= 16 * tile.warps)
    >>> space.default
    Tile(rows=64, warps=4)
    >>> space.parse({"rows": 128, "warps": 8})
    Tile(rows=128, warps=8)

    Args:
        config_type: a frozen dataclass whose fields are exactly the keys of `choices`.
        choices: the values of each field, default first; JSON scalars without duplicates.
        is_valid: whether a combination is allowed.
        first: configurations that a search which draws a sample tries right after the default.

    Raises:
        TypeError: `config_type` is no frozen dataclass, or a value is no JSON scalar.
        ValueError: fields and choices differ, or a field has no value or a value twice.
    """

    config_type: type[Config]
    choices: Mapping[str, Sequence[Value]]
    is_valid: Callable[[Config], bool] = lambda _: True
    first: Sequence[Config] = ()

    def __post_init__(self) -> None:
        kind = self.config_type
        if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:
            raise TypeError(f"config_type: expected a frozen dataclass, got {kind!r}")
        fields = [field.name for field in dataclasses.fields(kind)]
        if fields != list(self.choices):
            raise ValueError(f"choices: expected the fields {fields} in this order, got {list(self.choices)}")
        for name, values in self.choices.items():
            if foreign := [value for value in values if not isinstance(value, str | int | float | None)]:
                raise TypeError(f"choices[{name!r}]: expected str, int, float, bool or None, got {foreign[0]!r}")
            if not values or len({(type(value), value) for value in values}) < len(values):
                raise ValueError(f"choices[{name!r}]: expected at least one value and none twice, got {values!r}")

    @cached_property
    def candidates(self) -> tuple[Config, ...]:
        """Every valid configuration, the default first; errors as `default`."""
        return self.default, *itertools.islice(self._valid(), 1, None)

    @cached_property
    def default(self) -> Config:
        """The first valid configuration; found without making the others.

        Raises:
            ValueError: `is_valid` refuses every combination.
        """
        for config in self._valid():
            return config
        raise ValueError(f"is_valid: expected a rule that allows a combination of {dict(self.choices)}, got none")

    def _valid(self) -> Iterator[Config]:
        combinations = (self.config_type(*values) for values in itertools.product(*self.choices.values()))
        return (config for config in combinations if self.is_valid(config))

    def neighbours(self, config: Config) -> Iterator[Config]:
        """Valid configurations one step away: one number moved to the next smaller or larger, or one name changed."""
        for name, values in self.choices.items():
            for value in _next_values(getattr(config, name), values):
                neighbour: Config = dataclasses.replace(config, **{name: value})  # type: ignore[type-var]  # checked above
                if self.is_valid(neighbour):
                    yield neighbour

    def to_json(self, config: Config) -> dict[str, Value]:
        return {name: getattr(config, name) for name in self.choices}

    def parse(self, data: object) -> Config:
        """The configuration that `to_json` wrote, validated anew because the space may have changed since.

        Raises:
            ValueError: other fields, a value outside `choices`, or a combination that `is_valid` refuses.
        """
        if not isinstance(data, dict) or data.keys() != self.choices.keys():
            raise ValueError(f"configuration: expected the fields {list(self.choices)}, got {data!r}")
        for name, values in self.choices.items():
            # True == 1 == 1.0 in Python: the type is part of the value.
            if not any(type(data[name]) is type(value) and data[name] == value for value in values):
                raise ValueError(f"configuration[{name!r}]: expected one of {tuple(values)}, got {data[name]!r}")
        config = self.config_type(**data)
        if not self.is_valid(config):
            raise ValueError(f"configuration: expected one that is_valid allows, got {config!r}")
        return config


def _next_values(value: Value, values: Sequence[Value]) -> list[Value]:
    """The neighbours of `value`: adjacent ones where all are numbers, else all the others."""
    numbers = sorted(v for v in values if isinstance(v, int | float) and not isinstance(v, bool))
    if len(numbers) < len(values):
        return [other for other in values if other != value]
    at = next(i for i, number in enumerate(numbers) if number == value)
    return [*numbers[max(at - 1, 0) : at], *numbers[at + 1 : at + 2]]
