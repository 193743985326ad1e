"""Control flow, warps and faults of the emulated PTX: threads that part, meet, exchange and wait."""

import numpy as np
import pytest

pytest.importorskip("numpy")

from handwritten import execute, words

from swat_flex.inspection.ptx import Fault

X = words(2)
THREAD = np.arange(64)
LOOP = """mov.u32 %r3, 0; and.b32 %r4, %r2, 15;
$L1: setp.eq.s32 %p1, %r4, 0; @%p1 bra $L2; add.s32 %r3, %r3, %r4; sub.s32 %r4, %r4, 1; bra.uni $L1;
$L2: add.s32 %r3, %r3, 7;"""


def test_a_loop_with_a_trip_count_for_each_thread():
    x = words(3, 64 * 50)
    found, machine = execute(LOOP, x, blocks=50)
    trips = (x & 15).astype(np.int64)
    np.testing.assert_array_equal(found, trips * (trips + 1) // 2 + 7)
    assert 1 < machine.blocks < 50  # several thread blocks at a time, and several times


def test_threads_that_return_early():
    found, _ = execute("setp.lt.u32 %p1, %r1, 20; @%p1 ret; mov.u32 %r3, 5; bar.sync 0;", X)
    np.testing.assert_array_equal(found, np.where(THREAD < 20, 0, 5))


def test_warps_at_barriers_of_their_own():
    body = """mov.u32 %r3, 1; setp.lt.u32 %p1, %r1, 32; @%p1 bra $L1; mov.u32 %r3, 2; bar.sync 0; bra.uni $L2;
    $L1: mov.u32 %r3, 3; bar.sync 0; $L2: add.s32 %r3, %r3, 1;"""
    np.testing.assert_array_equal(execute(body, X)[0], np.where(THREAD < 32, 4, 3))


def test_blocks_with_loops_of_different_length_meet_at_barriers_alone():
    """Each block passes one barrier per iteration, and as many iterations as its number says."""
    body = """mov.u32 %r3, 0; shl.b32 %r5, %r1, 2; mov.u32 %r6, global_smem; add.s32 %r5, %r5, %r6;
    xor.b32 %r6, %r5, 128;
    $L1: st.shared.b32 [%r5], %r3; bar.sync 0; ld.shared.b32 %r7, [%r6]; add.s32 %r3, %r7, 1; bar.sync 0;
    setp.le.s32 %p1, %r3, %r90; @%p1 bra $L1;"""
    found, _ = execute(body, words(4, 64 * 9), blocks=9)
    np.testing.assert_array_equal(found.reshape(9, 64), np.repeat(np.arange(1, 10)[:, None], 64, 1))


def test_scopes_have_registers_and_labels_of_their_own():
    body = "{ .reg .b32 a; mov.b32 a, 3; bra.uni skip; mov.b32 a, 4; skip: mov.b32 %r3, a; }" * 2
    np.testing.assert_array_equal(execute(body, X)[0], np.full(64, 3))


SHUFFLES = {
    "shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1;": X[THREAD ^ 5],
    "shfl.sync.idx.b32 %r3, %r2, 3, 31, -1;": X[THREAD // 32 * 32 + 3],
    "shfl.sync.down.b32 %r3|%p1, %r2, 3, 31, -1; @!%p1 mov.u32 %r3, 0;": np.where(
        THREAD % 32 + 3 < 32, X[np.minimum(THREAD + 3, 63)], 0
    ),
    "shfl.sync.up.b32 %r3|%p1, %r2, 3, 0, -1; @!%p1 mov.u32 %r3, 0;": np.where(
        THREAD % 32 >= 3, X[np.maximum(THREAD - 3, 0)], 0
    ),
    "shfl.sync.idx.b32 %r3, %r2, 1, 0x181f, -1;": X[THREAD // 8 * 8 + 1],  # segments of eight
    "elect.sync %r4|%p1, -1; selp.b32 %r3, 1, 0, %p1;": (THREAD % 32 == 0).astype(np.uint32),
    "activemask.b32 %r3;": np.full(64, 0xFFFFFFFF, np.uint32),
}


@pytest.mark.parametrize("body", SHUFFLES)
def test_exchange_in_a_warp(body):
    np.testing.assert_array_equal(execute(body, X)[0], SHUFFLES[body])


def test_votes():
    true = X.view(np.int32) > 0
    mask = [int(sum(1 << k for k in range(32) if part[k])) for part in true.reshape(2, 32)]
    found, _ = execute("setp.gt.s32 %p1, %r2, 0; vote.sync.ballot.b32 %r3, %p1, -1;", X)
    np.testing.assert_array_equal(found, np.repeat(np.array(mask, np.uint32), 32))
    found, _ = execute("setp.lt.u32 %p1, %r1, 32; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r3, 1, 0, %p2;", X)
    np.testing.assert_array_equal(found, THREAD < 32)


def test_a_shuffle_in_a_branch_that_half_a_warp_takes():
    with pytest.raises(Fault, match="without all 32 threads"):
        execute("setp.lt.u32 %p1, %r1, 20; @%p1 shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", X)


def test_what_waits_forever_is_found():
    body = """mov.u32 %r5, global_smem; setp.eq.s32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], 2; bar.sync 0;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%r5];
    { .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%r5], 0; @!done bra.uni wait; }"""
    with pytest.raises(Fault, match="waits for something that no thread will do"):
        execute(body, X)


def test_a_fault_names_instruction_thread_address_and_source():
    body = (
        ".loc 1 61 24\nsetp.eq.s32 %p1, %r92, 70; mul.wide.u32 %rd7, %r1, 4096;\n@%p1 ld.global.b32 %r3, [%rd4+4096];"
    )
    with pytest.raises(Fault) as caught:
        execute(body, words(5, 128), blocks=2)
    fault = caught.value
    assert (fault.block, fault.thread) == ((1, 0, 0), 6)
    assert fault.instruction.source == "kernel.py:61"
    assert fault.address & 0xFFFFFFFF == 70 * 4 + 4096
    assert "out of bounds of x, byte 4376 of 512" in str(fault)
    assert "@%p1 ld.global.b32" in str(fault)
