"""Shared memory: bytes that know whether they are written, and words that know which warps touched them.

Between two barriers of a thread block one warp may not touch what another one wrote, nor write what another one read.
Each word keeps a stamp of its last reader and its last writer: the number of barriers its block had passed, and the
warp; so a barrier has to reset nothing. A word that several warps read has the stamp of warp `MANY`. What a tensor copy
brought may be read by warps that waited for its mbarrier, and by all of the block behind the next barrier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from swat_flex.inspection.ptx.faults import refuse
from swat_flex.inspection.ptx.formats import Array
from swat_flex.inspection.ptx.memory import rows

if TYPE_CHECKING:
    from swat_flex.inspection.ptx.machine import Machine

WINDOW = 1024  # address of the first byte of dynamic shared memory; what lies below is the system's, as on Hopper
MANY = 63
UNWRITTEN, WRITTEN, COMING, MBARRIER = 0, 1, 2, 3
_ALL_WRITTEN = {1: 1, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101, 16: 0x0101010101010101}


def _raced(stamps: Array, mine: Array) -> Array:
    """Tell which stamps another warp left since the last barrier."""
    raced: Array = (stamps >> 6 == mine >> 6) & (stamps != mine)
    return raced


class Shared:
    """The shared memory of the thread blocks that run together, one behind the other."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.machine, self.limit = machine, size
        self.room = -(-size // 16) * 16 + 16
        total = self.room * machine.blocks
        self.data, self.state = np.zeros(total, np.uint8), np.zeros(total, np.uint8)
        self.reader, self.writer = np.zeros(total // 4, np.int32), np.zeros(total // 4, np.int32)
        self.written = np.zeros(total // 4, np.int32)  # when, if by an instruction that a proxy fence must follow
        self.phases = 0  # of mbarriers, begun so far
        self.brought = np.zeros(total // 4, np.int32)  # by which phase's copies, or 0
        self.seen = np.zeros((1, machine.blocks * machine.warps), np.bool_)  # which warps waited for which phase
        self.since = np.zeros(1, np.int32)  # the block's epoch when the first of them did
        self.busy = np.zeros(total // 16, np.int32)  # products in flight that read these 16 bytes
        self.epoch = np.ones(machine.blocks, np.int32)  # barriers that the block has passed, and one
        self.clock = 1
        self.fenced = np.zeros(machine.blocks * machine.warps, np.int32)  # when each warp fenced last

    def stamp(self, lanes: Array) -> Array:
        """What the lanes' accesses are marked with."""
        stamps: Array = (self.epoch[self.machine.block_of[lanes]] << 6) | self.machine.warp_of[lanes]
        return stamps

    def pieces(self, address: Array, size: int, lanes: Array) -> Array:
        """Return the numbers of the pieces of `size` bytes at the addresses, after checking them."""
        offset = address - WINDOW
        wrong = (offset < 0) | (offset + size > self.limit) | (offset & (size - 1) != 0)
        if wrong.any():
            misaligned = offset[wrong.argmax()] & (size - 1)
            what = f"misaligned access of {size} bytes to" if misaligned else "out of bounds of"
            refuse(wrong, f"{what} shared memory ({self.limit} bytes)", lanes, address)
        numbers: Array = (offset + self.machine.block_of[lanes] * self.room) // size
        return numbers

    def _words(self, pieces: Array, size: int) -> Array:
        """Return the words of pieces, `[n, words]`."""
        if size <= 4:
            return (pieces * size >> 2)[:, None]
        return pieces[:, None] * (size // 4) + np.arange(size // 4)

    def _refuse(self, wrong: Array, what: str, pieces: Array, size: int, lanes: Array) -> None:
        if wrong.any():
            address = pieces * size % self.room + WINDOW
            refuse(np.any(wrong.reshape(len(lanes), -1), axis=1), f"{what} of shared memory", lanes, address)

    def check_written(self, pieces: Array, size: int, lanes: Array) -> None:
        """Refuse pieces with bytes that are not written, or are on their way."""
        state = rows(self.state, size)[pieces]
        wrong = state != _ALL_WRITTEN[size]
        if wrong.any():
            found = state.view(np.uint8)
            what = "reads unwritten bytes"
            if (found == COMING).any():
                what = "reads bytes that an asynchronous copy has yet to bring,"
            elif (found == MBARRIER).any():
                what = "reads an mbarrier as if it were data, a word"
            self._refuse(wrong, what, pieces, size, lanes)

    def read(self, address: Array, size: int, lanes: Array) -> Array:
        """Return `[n, size]` bytes."""
        pieces = self.pieces(address, size, lanes)
        self.check_written(pieces, size, lanes)
        words, mine = self._words(pieces, size), self.stamp(lanes)[:, None]
        raced = _raced(self.writer[words], mine)
        self._refuse(raced, "race: reads what another warp wrote since the last barrier, a word", pieces, size, lanes)
        if self.phases:
            self._check_waited(words, pieces, size, lanes, 1)
        self.mark_read(words, mine)
        return rows(self.data, size)[pieces].view(np.uint8).reshape(len(pieces), size)

    def mark_read(self, words: Array, mine: Array) -> None:
        """Note who read some words."""
        stamp = np.where(_raced(self.reader[words], mine), mine | MANY, mine)
        self.reader[words] = stamp
        beside = self.reader[words] != stamp  # another warp, in this very instruction
        if beside.any():
            self.reader[words[beside]] = np.broadcast_to(mine | MANY, words.shape)[beside]

    def _check_waited(self, words: Array, pieces: Array, size: int, lanes: Array, warps: int) -> None:
        """Refuse words of a tensor copy for which some of a lane's warps, its own and the next, did not wait."""
        number, warp = self.brought[words], (self.machine.warp_of + self.machine.block_of * self.machine.warps)[lanes]
        seen = np.logical_and.reduce([self.seen[number, (warp + n)[:, None]] for n in range(warps)])
        met = self.epoch[self.machine.block_of[lanes]][:, None] > self.since[number]
        what = "reads what a tensor copy brought without waiting for its mbarrier, a word"
        self._refuse((number > 0) & ~seen & ~met, what, pieces, size, lanes)

    def claim(self, pieces: Array, size: int, lanes: Array, data: bool = True) -> None:
        """Refuse to write pieces that somebody else may be using, or data over an mbarrier."""
        words, mine = self._words(pieces, size), self.stamp(lanes)[:, None]
        for table, did in ((self.reader, "read"), (self.writer, "wrote")):
            what = f"race: writes what another warp {did} since the last barrier, a word"
            self._refuse(_raced(table[words], mine), what, pieces, size, lanes)
        self._refuse(self.busy[pieces * size >> 4] != 0, "writes what a product in flight reads, a word", pieces, size,
                     lanes)  # fmt: skip
        state = rows(self.state, size)[pieces].view(np.uint8).reshape(len(lanes), -1)
        self._refuse(state == COMING, "writes what an asynchronous copy in flight writes, a word", pieces, size, lanes)
        if data:
            self._refuse(state == MBARRIER, "writes data over an mbarrier, a word", pieces, size, lanes)

    def write(self, address: Array, values: Array, lanes: Array) -> None:
        """Write `[n, size]` bytes."""
        size = values.shape[1]
        pieces = self.pieces(address, size, lanes)
        self.claim(pieces, size, lanes)
        self.land(pieces, values, lanes)
        wanted = rows(np.ascontiguousarray(values).reshape(-1), size)
        self._refuse(rows(self.data, size)[pieces] != wanted, "two threads write different values to one place",
                     pieces, size, lanes)  # fmt: skip

    def announce(self, pieces: Array, size: int, lanes: Array) -> None:
        """Note that bytes are on their way to pieces."""
        self.claim(pieces, size, lanes)
        rows(self.state, size)[pieces] = COMING * _ALL_WRITTEN[size]

    def land(self, pieces: Array, values: Array, lanes: Array) -> None:
        """Put bytes into pieces, which a proxy fence must follow before the asynchronous proxy touches them."""
        words = self._place(pieces, values)
        self.clock += 1
        self.writer[words] = self.stamp(lanes)[:, None]
        self.written[words] = self.clock
        if self.phases:
            self.brought[words] = 0

    def bring(self, pieces: Array, values: Array, phase: int) -> None:
        """Put the bytes of a tensor copy into pieces of 16 bytes."""
        words = self._place(pieces, values)
        self.written[words] = 0
        self.brought[words] = phase

    def _place(self, pieces: Array, values: Array) -> Array:
        size = values.shape[1]
        rows(self.data, size)[pieces] = rows(np.ascontiguousarray(values).reshape(-1), size)
        rows(self.state, size)[pieces] = _ALL_WRITTEN[size]
        return self._words(pieces, size)

    def new_phase(self) -> int:
        """Number a phase of an mbarrier."""
        self.phases += 1
        if self.phases >= len(self.since):
            self.seen = np.concatenate([self.seen, np.zeros_like(self.seen)])
            self.since = np.concatenate([self.since, np.full_like(self.since, np.iinfo(np.int32).max)])
        return self.phases

    def acquire(self, phase: int, lanes: Array) -> None:
        """Note that lanes of one block have waited for a phase."""
        block = self.machine.block_of[lanes]
        self.seen[phase, np.unique(block * self.machine.warps + self.machine.warp_of[lanes])] = True
        self.since[phase] = min(self.since[phase], self.epoch[block[0]])

    def use_barrier(self, address: Array, lanes: Array, becomes: int | None = None) -> None:
        """Note that lanes use an mbarrier, or that they make or end it, which nobody may do beside its users.

        `becomes` is what its bytes become then, MBARRIER or UNWRITTEN.
        """
        pieces = self.pieces(address, 8, lanes)
        words, mine = self._words(pieces, 8), self.stamp(lanes)[:, None]
        if becomes is not None:
            self.claim(pieces, 8, lanes, data=False)
            self.writer[words] = mine
            rows(self.state, 8)[pieces] = becomes * _ALL_WRITTEN[8]
            return
        what = "race: uses an mbarrier that another warp made or ended since the last barrier, a word"
        self._refuse(_raced(self.writer[words], mine), what, pieces, 8, lanes)
        self.mark_read(words, mine)

    def fence(self, lanes: Array) -> None:
        """Make what these lanes' warps wrote visible to the asynchronous proxy."""
        self.fenced[np.unique(lanes // 32)] = self.clock

    def fetch(self, chunks: Array, lanes: Array) -> Array:
        """Return the 16-bit numbers `[groups, n, 8]` that warpgroups' products read.

        They lie in pieces of 16 bytes, chunks `[groups, n]`; lanes `[groups]` are the first of each warpgroup.
        """
        flat, of = chunks.reshape(-1), np.repeat(lanes, chunks.shape[1])
        self.check_written(flat, 16, of)
        words = flat[:, None] * 4 + np.arange(4)
        mine = (self.stamp(of) | MANY)[:, None]
        writer = self.writer[words]
        self._refuse(writer >> 6 == mine >> 6, "race: a product reads what was written since the last barrier, a word",
                     flat, 16, of)  # fmt: skip
        self.check_fenced(flat, of, "a product reads")
        if self.phases:
            self._check_waited(words, flat, 16, of, 4)
        self.reader[words] = mine
        return self.data.view(np.uint16).reshape(-1, 8)[flat].reshape(*chunks.shape, 8)

    def check_fenced(self, pieces: Array, lanes: Array, what: str) -> None:
        """Refuse pieces of 16 bytes that warps wrote which fenced no proxy since."""
        words = self._words(pieces, 16)
        warp = (self.machine.block_of[lanes] * self.machine.warps)[:, None] + (self.writer[words] & MANY)
        unfenced = self.written[words] > self.fenced[np.minimum(warp, len(self.fenced) - 1)]
        self._refuse(unfenced, f"{what} what was written without a proxy fence since, a word", pieces, 16, lanes)
