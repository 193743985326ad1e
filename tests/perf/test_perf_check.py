"""No time without a passed check."""

from dataclasses import replace

import pytest
import torch
from perf_fakes import CPU, TINY, Broken, WindowTooWide, WrongGradient

from perf.cases import PASSES, layer
from perf.check import check
from perf.measure import Setting, _ceilings, admit, run_races
from perf.peers.ours import Naive, Swat
from perf.peers.pytorch import SdpaBand, SdpaCausal
from swat_flex import dispatch, flex_swat

SETTING = Setting(CPU, rounds=2, sizes=(64, 2**16))


def race(peers, case=TINY, passes="forward"):
    return run_races([(case, passes, peers)], SETTING)[0]


@pytest.mark.parametrize("passes", PASSES)
def test_a_wrong_adapter_is_refused_before_timing(passes):
    found = race([WindowTooWide(), Swat("banded")], passes=passes)
    wrong, right = found.rows
    assert wrong.status == "refused"
    assert wrong.reason.startswith("wrong: query ")
    assert "out off by" in wrong.reason
    assert wrong.median_ms is None
    assert wrong.rounds == 0
    assert right.status == "timed"
    assert right.use <= 1


def test_a_wrong_gradient_is_refused_where_gradients_are_timed():
    assert race([WrongGradient()], passes="forward").rows[0].status == "timed"
    refused = race([WrongGradient()], passes="both").rows[0]
    assert refused.status == "refused"
    assert refused.errors["dv"] > 100 * refused.errors["out"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peer_s_looser_bar_still_refuses_one_key_too_many(dtype):
    class TooWide(SdpaBand):
        def prepare(self, case, q, k, v):
            return super().prepare(replace(case, window=case.window + 1), q, k, v)

    case = layer("wide", "a window in which one key weighs little", (4, 4), 700, 512, dtype=dtype)
    assert admit(SdpaBand(), case, "forward", case.tensors(CPU), CPU).checked.right
    refused = admit(TooWide(), case, "forward", case.tensors(CPU), CPU)
    assert refused.status == "refused"
    assert "query 699 sees key 187" in refused.reason


def test_what_is_not_a_number_is_refused():
    class NotANumber(Swat):
        def prepare(self, case, q, k, v):
            return lambda: q + float("nan")

    row = race([NotANumber("banded")]).rows[0]
    assert row.status == "refused"
    assert row.errors == {}


def test_an_exception_is_that_peer_s_reason_and_ends_nothing():
    broken, right = race([Broken(), Swat("banded")]).rows
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: no kernel image is available")
    assert right.status == "timed"


def test_who_fails_in_the_race_has_no_time_and_the_others_go_on():
    class Dies(Swat):
        """Right for as long as it is checked; its memory is counted once more."""

        def prepare(self, case, q, k, v):
            left = iter(range(4))

            def run():
                if next(left, None) is None:
                    raise RuntimeError("out of memory")
                return flex_swat(q, k, v, case.window)

            return run

    dead = Dies("banded")
    dead.name = "dies"
    found = race([dead, Swat("banded")])
    assert (found.rows[0].status, found.rows[0].reason) == ("failed", "RuntimeError: out of memory")
    assert found.row("swat banded").rounds == 2


@pytest.mark.parametrize("peer", [Naive(), Swat("banded"), SdpaBand(), SdpaCausal()], ids=lambda peer: peer.name)
@pytest.mark.parametrize("length", [2, 63, 64, 65, 191, 193, 1000])
def test_right_adapters_pass_at_ragged_lengths(peer, length):
    case = layer("ragged", "sampled rows at the ends and in the middle", (4, 2), length, 48, head_dim=24)
    q, k, v = (x.requires_grad_() for x in case.tensors(CPU))
    found = check(peer, case, (q, k, v), peer.prepare(case, q, k, v), "both")
    assert found.right, str(found)
    assert found.rows >= min(length, 150)  # of three samples of 64, fewer where they meet
    assert set(found.errors) == {"out", "dq", "dk", "dv"}


def test_an_error_outside_the_first_rows_is_seen():
    def late(q, k, v):
        out = SdpaBand().prepare(case, q, k, v)()
        out[:, :, 400:] *= 1.01
        return out

    case = layer("late", "the end is sampled too", (2, 2), 1000, 48)
    tensors = case.tensors(CPU)
    assert not check(SdpaBand(), case, tensors, lambda: late(*tensors), "forward").right


def test_ceilings_load_and_the_chosen_row_are_part_of_a_race():
    peers = [Naive(), Swat("cpp"), Swat("banded"), Swat("triton")]
    found = race(peers)
    chosen = dispatch.choose(peers[1].definition(TINY).problem(TINY, CPU)).backend  # banded where there is no compiler
    assert found.chosen == f"swat {chosen}"
    assert {"matmul", "copy"} == set(found.ceilings)
    assert found.ceilings["matmul"].per_second == pytest.approx(2 * 64**3 / found.ceilings["matmul"].ms * 1e3)
    rows = {row.peer: row for row in found.rows}
    assert [rows[name].status for name in ("naive", "swat banded", "swat triton")] == ["timed", "timed", "skipped"]
    assert rows[found.chosen].status == "timed"
    assert "GPU" in rows["swat triton"].reason
    banded = found.row("swat banded")
    assert banded.configuration
    assert banded.source
    assert banded.flops == 4 * 4 * 16 * 4 * (150 * 48 - 48 * 47 // 2)  # 4 heads of 64: 2·P·(D + Dv) each


def test_ceilings_draw_from_a_generator_of_their_own():
    """The device's may be the one that a failed capture spoiled."""
    before = torch.get_rng_state()
    _ceilings(TINY, Setting(CPU, 2, sizes=(64, 2**16)))
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_counted_beyond_the_inputs():
    dense = layer("dense", "its matrices outweigh everything", (8, 8), 512, 48)
    found = race([Naive(), Swat("banded")], dense)
    matrix = 8 * 512 * 512 * torch.float32.itemsize
    naive, banded = found.row("naive"), found.row("swat banded")
    if naive.peak_bytes is None:
        pytest.skip("this system counts no memory")
    assert naive.peak_bytes >= matrix
    assert banded.peak_bytes < naive.peak_bytes / 2
