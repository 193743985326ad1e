import dataclasses
import doctest
import itertools
import json
from dataclasses import dataclass

import pytest

import autotune.space
from autotune import Space


@dataclass(frozen=True)
class Tile:
    rows: int
    warps: int
    layout: str
    fused: bool


@pytest.fixture
def space() -> Space[Tile]:
    values = {"rows": (64, 16, 128, 32), "warps": (4, 8), "layout": ("row", "column"), "fused": (True, False)}
    return Space(Tile, values, lambda tile: tile.rows >= 8 * tile.warps)


def test_the_docstring_is_true():
    assert doctest.testmod(autotune.space).failed == 0


def test_candidates_are_the_valid_product_in_order_and_the_first_is_the_default(space):
    product = [Tile(*values) for values in itertools.product(*space.choices.values())]
    assert list(space.candidates) == [tile for tile in product if tile.rows >= 8 * tile.warps]
    assert space.default == space.candidates[0] == Tile(64, 4, "row", True)


def test_json_round_trip_of_every_candidate(space):
    for tile in space.candidates:
        assert space.parse(json.loads(json.dumps(space.to_json(tile)))) == tile


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": 256}, r"configuration\['rows'\]: expected one of \(64, 16, 128, 32\), got 256"),
        ({"rows": 64.0}, "got 64.0"),
        ({"fused": 1}, "got 1"),
        ({"rows": 32, "warps": 8}, "expected one that is_valid allows"),
        ({"stages": 2}, "expected the fields"),
    ],
)
def test_parse_refuses_what_the_space_does_not_hold(space, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        space.parse({**space.to_json(space.default), **change})


@pytest.mark.parametrize("data", [None, [], "rows", {}, {"rows": [64]}])
def test_parse_refuses_what_is_no_configuration(space, data):
    with pytest.raises(ValueError, match="expected the fields"):
        space.parse(data)


def test_neighbours_step_to_adjacent_numbers_and_to_any_other_name(space):
    tile = Tile(64, 4, "row", True)
    changes = [{"rows": 32}, {"rows": 128}, {"warps": 8}, {"layout": "column"}, {"fused": False}]
    assert list(space.neighbours(tile)) == [dataclasses.replace(tile, **change) for change in changes]


def test_neighbours_are_mutual_and_valid(space):
    for tile in space.candidates:
        for other in space.neighbours(tile):
            assert other in space.candidates
            assert tile in space.neighbours(other)


def test_construction_refuses():
    @dataclass
    class Thawed:
        rows: int

    with pytest.raises(TypeError, match="expected a frozen dataclass"):
        Space(Thawed, {"rows": (1,)})
    with pytest.raises(ValueError, match="choices: expected the fields"):
        Space(Tile, {"rows": (1,)})
    rest = {"warps": (4,), "layout": ("row",), "fused": (True,)}
    with pytest.raises(ValueError, match="none twice"):
        Space(Tile, {"rows": (1, 1), **rest})
    with pytest.raises(ValueError, match="at least one value"):
        Space(Tile, {"rows": (), **rest})
    with pytest.raises(TypeError, match="expected str, int"):
        Space(Tile, {"rows": ((1,),), **rest})
    with pytest.raises(ValueError, match="a rule that allows a combination"):
        _ = Space(Tile, {"rows": (1,), **rest}, lambda _: False).default
