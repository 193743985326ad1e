"""Global memory: tensors at addresses of their own, with bounds, alignment and a count of writes per byte."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swat_flex.inspection.ptx.faults import Fault, refuse
from swat_flex.inspection.ptx.formats import RAW, Array

BASE, STEP = 0x7000_0000_0000, 40  # regions lie 2^STEP bytes apart
MAPS = 0x6000_0000  # where the descriptors of tensors lie; Triton 3.9 takes the address of a parameter in 32 bits


@dataclass(slots=True)
class Region:
    """A piece of memory.

    Attributes:
        name: for messages.
        data: its bytes.
        writes: how often each byte was written.
        members: which bytes belong to a tensor, or None for all: what lies between them must not be touched.
    """

    name: str
    data: Array
    writes: Array
    members: Array | None


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A descriptor: a tensor as `cp.async.bulk.tensor` addresses it, outermost axis first.

    Attributes:
        address: of the first element.
        shape: elements per axis.
        strides: bytes per axis.
        box: elements that one copy brings, per axis.
        itemsize: bytes per element.
        swizzle: bytes of a row whose 16-byte pieces are permuted: 0, 32, 64 or 128.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int


class Global:
    """The regions and the descriptors of a launch."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.maps: list[TensorMap] = []

    def add(self, name: str, data: Array, members: Array | None = None) -> int:
        """Take bytes as they are, without a copy, and return their address."""
        self.regions.append(Region(name, data, np.zeros(len(data), np.uint8), members))
        return self.address_of(len(self.regions) - 1)

    def address_of(self, number: int) -> int:
        """Return where a region begins."""
        return BASE + (number << STEP)

    def describe(self, found: TensorMap) -> int:
        """Keep a descriptor and return its address."""
        self.maps.append(found)
        return MAPS + 128 * (len(self.maps) - 1)

    def map_at(self, address: int) -> TensorMap:
        number, rest = divmod(address - MAPS, 128)
        if rest or not 0 <= number < len(self.maps):
            raise Fault("no descriptor of a tensor there", address=address)
        return self.maps[number]

    def _find(self, address: Array, size: int, lanes: Array) -> tuple[Region, Array]:
        """Return the one region of all addresses, and the numbers of the pieces of `size` bytes in it."""
        number = (int(address[0]) - BASE) >> STEP
        if not 0 <= number < len(self.regions):
            raise Fault("belongs to no tensor", lane=int(lanes[0]), address=int(address[0]))
        region, offset = self.regions[number], address - (BASE + (number << STEP))
        outside = (offset < 0) | (offset + size > len(region.data))
        byte = offset[outside.argmax()]
        refuse(outside, f"out of bounds of {region.name}, byte {byte} of {len(region.data)}", lanes, address)
        refuse(offset & (size - 1) != 0, f"misaligned access of {size} bytes to {region.name}", lanes, address)
        pieces = offset // size
        if region.members is not None:
            belongs = region.members[: len(region.members) // size * size].reshape(-1, size)[pieces].all(1)
            refuse(~belongs, f"out of bounds of {region.name}, between its elements", lanes, address)
        return region, pieces

    def _groups(self, address: Array) -> list[Array]:
        """Split a selection of addresses, as positions, by region."""
        number = (address - BASE) >> STEP
        if (number == number[0]).all():
            return [np.arange(len(address))]
        return [np.flatnonzero(number == n) for n in np.unique(number)]

    def read(self, address: Array, size: int, lanes: Array) -> Array:
        """Return `[n, size]` bytes; `lanes` says whose access each is."""
        groups = self._groups(address)
        if len(groups) > 1:
            found = np.empty((len(address), size), np.uint8)
            for group in groups:
                found[group] = self.read(address[group], size, lanes[group])
            return found
        region, pieces = self._find(address, size, lanes)
        return rows(region.data, size)[pieces].view(np.uint8).reshape(len(pieces), size)

    def write(self, address: Array, values: Array, lanes: Array) -> None:
        """Write `[n, size]` bytes."""
        groups = self._groups(address)
        if len(groups) > 1:
            for group in groups:
                self.write(address[group], values[group], lanes[group])
            return
        size = values.shape[1]
        region, pieces = self._find(address, size, lanes)
        table, wanted = rows(region.data, size), rows(np.ascontiguousarray(values).reshape(-1), size)
        table[pieces] = wanted
        np.add.at(region.writes[: len(region.writes) // size * size].reshape(-1, size), pieces, 1)
        differs = (table[pieces] != wanted).reshape(len(pieces), -1).any(1)
        refuse(differs, f"two threads write different values to one place of {region.name}", lanes, address)

    def update(self, address: Array, values: Array, lanes: Array) -> Array:
        """Add `values` one after another to the numbers at `[n]` addresses, and return what each found there."""
        old = np.empty_like(values)
        for group in self._groups(address):
            region, pieces = self._find(address[group], values.itemsize, lanes[group])
            table = region.data[: len(region.data) // values.itemsize * values.itemsize].view(values.dtype)
            if len(np.unique(pieces)) == len(pieces):
                old[group] = table[pieces]
                table[pieces] += values[group]
            else:
                for at, piece in zip(group, pieces, strict=True):
                    old[at] = table[piece]
                    table[piece] += values[at]
            np.add.at(region.writes[: len(table) * values.itemsize].reshape(-1, values.itemsize), pieces, 1)
        return old


def rows(data: Array, size: int) -> Array:
    """Bytes as pieces of `size`, each one element, or two of 8 bytes for 16."""
    data = data[: len(data) // size * size]
    return data.view(np.uint64).reshape(-1, 2) if size == 16 else data.view(RAW[size])
