"""Loads, stores and asynchronous copies of the emulated PTX, and the rules of memory that they may break."""

import numpy as np
import pytest

pytest.importorskip("numpy")

from handwritten import execute, words

from swat_flex.inspection.ptx import Fault, Global, TensorMap

X = words(6)
THREAD = np.arange(64)
# %r5: the thread's own word of shared memory; %r6: that of the same thread in the other warp.
OWN = """mov.u32 %r6, global_smem; shl.b32 %r5, %r1, 2; xor.b32 %r7, %r5, 128; add.s32 %r5, %r5, %r6;
add.s32 %r6, %r6, %r7; mov.u32 %r3, 0; """


def test_exchange_across_a_barrier():
    found, _ = execute(OWN + "st.shared.b32 [%r5], %r2; bar.sync 0; ld.shared.b32 %r3, [%r6];", X)
    np.testing.assert_array_equal(found, X[THREAD ^ 32])


FAULTS = {
    "race: reads what another warp wrote": "st.shared.b32 [%r5], %r2; ld.shared.b32 %r3, [%r6];",
    "race: writes what another warp read": "st.shared.b32 [%r5], %r2; bar.sync 0; ld.shared.b32 %r3, [%r6]; "
    "st.shared.b32 [%r5], %r2;",
    "race: writes what another warp wrote": "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L1; st.shared.b32 [%r6], %r2; $L1: "
    "setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%r5], %r2;",
    "unwritten bytes": "st.shared.b16 [%r5], %rs1; ld.shared.b32 %r3, [%r5];",
    "misaligned access of 4 bytes to shared": "st.shared.b32 [%r5+2], %r2;",
    "out of bounds of shared": "st.shared.b32 [%r5+1000], %r2;",
    "different values to one place of shared": "mov.u32 %r5, global_smem; setp.lt.u32 %p1, %r1, 32; "
    "@%p1 st.shared.b32 [%r5], %r1;",
    "out of bounds of x": "ld.global.b32 %r3, [%rd4+4];",
    "misaligned access of 4 bytes to x": "setp.eq.s32 %p1, %r1, 3; @%p1 ld.global.b32 %r3, [%rd4+2];",
    "belongs to no tensor": "mov.b64 %rd4, 4096; ld.global.b32 %r3, [%rd4];",
    "different values to one place of out": "sub.s64 %rd7, %rd2, %rd3; st.global.b32 [%rd7], %r1;",
    "has yet to bring": "cp.async.ca.shared.global [%r5], [%rd4], 4; cp.async.commit_group; ld.shared.b32 %r3, [%r5];",
    "asynchronous copy in flight writes": "cp.async.ca.shared.global [%r5], [%rd4], 4; st.shared.b32 [%r5], %r2;",
    "copies 4 bytes": "cp.async.cg.shared.global [%r5], [%rd4], 4;",
}


@pytest.mark.parametrize("words_of_the_fault", FAULTS)
def test_a_broken_rule_is_a_fault(words_of_the_fault):
    with pytest.raises(Fault, match=words_of_the_fault):
        execute(OWN + FAULTS[words_of_the_fault], X)


def test_one_value_at_one_address_by_many_threads_is_no_fault():
    execute(OWN + "mov.u32 %r5, global_smem; mov.u32 %r4, 7; st.shared.b32 [%r5], %r4;", X)


def test_vectors_and_narrow_types():
    body = (
        OWN
        + """mov.u32 %r6, global_smem; shl.b32 %r5, %r1, 4; add.s32 %r5, %r5, %r6; add.s32 %r10, %r2, 1;
    st.shared.v4.b32 [%r5], {%r2, %r10, %r1, %r2}; ld.shared.v2.b32 {%r11, %r12}, [%r5+8]; ld.shared.s8 %r13, [%r5+1];
    add.s32 %r3, %r11, %r12; add.s32 %r3, %r3, %r13;"""
    )
    signed = (X >> np.uint32(8)).astype(np.uint8).view(np.int8).astype(np.int32).view(np.uint32)
    found, _ = execute(body, X)
    np.testing.assert_array_equal(found, THREAD.astype(np.uint32) + X + signed)


def test_what_caches_should_keep_changes_nothing():
    body = """createpolicy.fractional.L2::evict_last.b64 %rd7, 1.0;
    ld.global.L1::evict_last.L2::cache_hint.b32 %r3, [%rd4], %rd7;"""
    np.testing.assert_array_equal(execute(body, X)[0], X)


def test_writes_are_counted_and_gaps_are_no_part_of_a_tensor():
    _, machine = execute("st.global.b32 [%rd2], %r2; mov.u32 %r3, 1;", X)
    assert (machine.memory.regions[1].writes == 2).all()
    memory = Global()
    gaps = np.tile(np.repeat([True, False], 8), 64)
    memory.add("sparse", np.zeros(1024, np.uint8), gaps)
    base = memory.address_of(0)
    even = f"mul.wide.u32 %rd7, %r1, 16; add.s64 %rd7, %rd7, {base}; ld.global.b64 %rd8, [%rd7]; mov.u32 %r3, 0;"
    execute(even, X, memory=memory)
    with pytest.raises(Fault, match="out of bounds of sparse, between its elements"):
        execute(even.replace("[%rd7]", "[%rd7+8]"), X, memory=memory)


def test_atomic_additions_to_one_address():
    body = "sub.s64 %rd7, %rd4, %rd3; atom.global.gpu.acq_rel.add.u32 %r3, [%rd7], 1;"
    found, machine = execute(body, 0 * X)
    np.testing.assert_array_equal(np.sort(found), THREAD)
    assert machine.memory.regions[0].data.view(np.uint32)[0] == 64


# Each thread copies 16 bytes: its own four words of 64·4.
COPY = "mov.u32 %r6, global_smem; shl.b32 %r5, %r1, 4; add.s32 %r5, %r5, %r6; mul.wide.u32 %rd7, %r1, 12; " \
    "add.s64 %rd7, %rd4, %rd7; mov.u32 %r3, 0; "  # fmt: skip
START = "cp.async.cg.shared.global [%r5], [%rd7], 16; cp.async.commit_group; "


def test_groups_of_copies_are_waited_for_in_order():
    big = words(7, 256)
    both = COPY + START + START.replace("[%r5]", "[%r5+1024]") + "cp.async.wait_group {}; "
    for wait, offset in ((1, 0), (0, 1024), (0, 0)):
        found, _ = execute(both.format(wait) + f"ld.shared.b32 %r3, [%r5+{offset}];", big, shared=2048)
        np.testing.assert_array_equal(found, big[::4])
    with pytest.raises(Fault, match="has yet to bring"):
        execute(both.format(1) + "ld.shared.b32 %r3, [%r5+1024];", big, shared=2048)
    with pytest.raises(Fault, match="has yet to bring"):  # of no group
        execute(COPY + START.replace("cp.async.commit_group;", "cp.async.wait_group 0;")
                + "ld.shared.b32 %r3, [%r5];", big)  # fmt: skip
    execute(COPY + START.replace("cp.async.commit_group;", "cp.async.wait_all;") + "ld.shared.b32 %r3, [%r5];", big)


def test_the_wait_is_for_the_waiting_threads_copies_alone():
    """Another warp's are there behind a barrier."""
    big = words(8, 256)
    read = "xor.b32 %r8, %r5, 512; ld.shared.b32 %r3, [%r8];"
    with pytest.raises(Fault, match="race"):
        execute(COPY + START + "cp.async.wait_group 0;" + read, big)
    found, _ = execute(COPY + START + "cp.async.wait_group 0; bar.sync 0;" + read, big)
    np.testing.assert_array_equal(found, big[::4][THREAD ^ 32])


def test_a_copy_of_fewer_bytes_fills_with_zeros_and_reads_nothing():
    big = words(9, 256)
    body = (
        COPY
        + """setp.lt.u32 %p1, %r1, 10; selp.b32 %r9, 16, 0, %p1; @!%p1 add.s64 %rd7, %rd7, 1048576;
    cp.async.cg.shared.global [%r5], [%rd7], 16, %r9; cp.async.commit_group; cp.async.wait_group 0;
    ld.shared.b32 %r3, [%r5];"""
    )
    np.testing.assert_array_equal(execute(body, big)[0], np.where(THREAD < 10, big[::4], 0))


BULK = """mov.u32 %r5, global_smem; add.s32 %r8, %r5, 4096; setp.eq.s32 %p1, %r1, 0; mov.b64 %rd10, {map};
@%p1 mbarrier.init.shared::cta.b64 [%r8], 1; bar.sync 0; mov.b32 %r20, {row}; mov.b32 %r21, 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], {bytes};
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r5], [%rd10, {{%r21, %r20}}], [%r8];
{{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%r8], 0; @!done bra.uni wait; }}
shl.b32 %r9, %r1, 2; add.s32 %r9, %r9, %r5; ld.shared.b32 %r3, [%r9+{offset}];"""


def bulk(swizzle, row=0, size=None, columns=32, offset=0, edit=lambda body: body):
    """64 words from `offset` on of shared memory, where 32 rows of so many 16-bit columns were copied."""
    memory, data = Global(), np.arange(64 * 64, dtype=np.uint16)
    base = memory.add("matrix", data.view(np.uint8))
    where = memory.describe(TensorMap(base, (40, 64), (128, 2), (32, columns), 2, swizzle))
    body = BULK.format(map=where, row=row, bytes=32 * columns * 2 if size is None else size, offset=offset)
    found, _ = execute(edit(body), X, memory=memory, shared=8192)
    return found.view(np.uint16)


@pytest.mark.parametrize(("swizzle", "columns"), [(0, 32), (32, 16), (64, 32), (128, 64)])
def test_a_tensor_copy_brings_a_box_with_its_16_byte_pieces_permuted(swizzle, columns):
    """Piece c of row r lies at c XOR r mod 8, (r mod 8) / 2 or (r mod 8) / 4 for rows of 128, 64 and 32 bytes."""
    pieces, by = columns // 8, {0: 1, 32: 4, 64: 2, 128: 1}[swizzle]
    matrix = (np.arange(32)[:, None] * 64 + np.arange(columns)).reshape(32, pieces, 8)
    wanted = np.empty_like(matrix)
    for r in range(32):
        for c in range(pieces):
            wanted[r, c ^ (r % 8 // by if swizzle else 0)] = matrix[r, c]
    found = np.concatenate([bulk(swizzle, columns=columns, offset=o) for o in range(0, 32 * columns * 2, 256)])
    np.testing.assert_array_equal(found, wanted.reshape(-1))


def test_a_tensor_copy_gives_zeros_outside_the_tensor():
    found = bulk(0, row=39)
    np.testing.assert_array_equal(found[:64], [*range(39 * 64, 39 * 64 + 32), *[0] * 32])


# Rules of the PTX manual for mbarrier and the asynchronous proxy: the words of the fault, what is replaced, by what.
INIT, POLL = "@%p1 mbarrier.init.shared::cta.b64 [%r8], 1;", "@!done bra.uni wait;"
INVALIDATE = "@%p1 mbarrier.inval.shared::cta.b64 [%r8];"
ARRIVE = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 2048;"
MBARRIER = {
    "must be waited for": ("has yet to bring", POLL, ""),
    "is there for those that waited": ("without waiting for its mbarrier", "{ .reg", "@!%p1 bra $L9; { .reg"),
    "and for all behind a barrier": (None, "{ .reg", "@!%p1 bra $L9; { .reg"),
    "brings what is expected": ("no thread will do", "2048;", "1000;"),
    "needs an mbarrier": ("no mbarrier was initialised", INIT, ""),
    "needs one that counts": ("expects 0 arrivals", "[%r8], 1;", "[%r8], 0;"),
    "counts no more than it can": ("expects 1048576 arrivals", "[%r8], 1;", "[%r8], 1048576;"),
    "expects no more than it can": ("more than it can count", "2048;", "1048576;"),
    "has one beginning": ("initialises an mbarrier that is in use", INIT, INIT + INIT),
    "has one arrival": ("arrives more often", ARRIVE, ARRIVE + ARRIVE),
    "is no data to read": ("reads an mbarrier as if it were data", ARRIVE, ARRIVE + "ld.shared.b32 %r3, [%r8];"),
    "is no data to write": ("writes data over an mbarrier", ARRIVE, ARRIVE + "@%p1 st.shared.b32 [%r8+4], %r3;"),
    "is none after its end": ("no mbarrier was initialised", ARRIVE, INVALIDATE + ARRIVE),
    "ends after its copies": ("while bytes are on their way", "{ .reg", INVALIDATE + "{ .reg"),
    "follows what was written by a fence": ("without a proxy fence", ARRIVE, "@%p1 st.shared.b32 [%r5], %r3;" + ARRIVE),
    "follows what was written": (
        None, ARRIVE, "@%p1 st.shared.b32 [%r5], %r3; fence.proxy.async.shared::cta;" + ARRIVE
    ),
    "may be expected apart": (
        None, ARRIVE,
        "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r8], 1024;" + ARRIVE.replace("2048", "1024"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MBARRIER)
def test_a_tensor_copy(name):
    fault, old, new = MBARRIER[name]
    label = "$L9: bar.sync 0;" if name.startswith("and for all") else "$L9:"

    def edit(body):
        return body.replace("shl.b32 %r9", f"{label} shl.b32 %r9").replace(old, new, 1)

    if fault is None:
        bulk(0, edit=edit)
        return
    with pytest.raises(Fault, match=fault):
        bulk(0, edit=edit)


def test_a_phase_ends_with_its_last_arrival():
    """Two phases of an arrival by every thread: none waits for the first one's successor, which nobody began."""
    body = """mov.u32 %r5, global_smem; setp.eq.s32 %p1, %r1, 0; mov.u32 %r3, 5;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], 64; bar.sync 0;
    mbarrier.arrive.shared::cta.b64 _, [%r5]; {wait0}
    mbarrier.arrive.release.cta.shared::cta.b64 _, [%r5]; {wait1}"""
    wait = "{{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%r5], {}; @!done bra.uni wait; }}"
    zero, one = wait.format(0), wait.format(1)
    assert (execute(body.replace("{wait0}", zero).replace("{wait1}", one), X)[0] == 5).all()
    assert (execute(body.replace("{wait0}", "bar.sync 0;").replace("{wait1}", one), X)[0] == 5).all()
    with pytest.raises(Fault, match="waits for something that no thread will do"):
        execute(body.replace("{wait0}", zero).replace("{wait1}", zero), X)
