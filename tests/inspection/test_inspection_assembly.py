"""The parsers and the search for loops, on literal machine code."""

import subprocess
import sys

import pytest

from swat_flex.inspection import inner_loops, parse_amdgcn, parse_sass
from swat_flex.inspection.bound import tensor_work

# As cuobjdump prints it: each instruction's second word of encoding stands on a line of its own.
SASS = """
	code for sm_90a
		Function : helper
        /*0000*/                   EXIT ;                                   /* 0x000000000000794d */
                                                                            /* 0x000fea0003800000 */
		Function : forward
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
                                                                            /* 0x000e620000000800 */
        /*0010*/              @!P0 BRA 0x90 ;                               /* 0x0000000000028947 */
                                                                            /* 0x000fea0003800000 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ; /* 0x00e000000818 */
        /*0030*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;              /* 0x0000000104040890 */
        /*0040*/                   MUFU.EX2 R2, R2 ;                        /* 0x0000000200027308 */
        /*0050*/              @!PT FADD.FTZ R2, -R2.reuse, -RZ ;            /* 0x800000ff02020221 */
        /*0060*/                   IMAD.MOV.U32 R3, RZ, RZ, R2 ;            /* 0x000000ffff037224 */
        /*0070*/                   UISETP.GE.AND UP0, UPT, UR4, UR5, UPT ;  /* 0x000000050400728c */
        /*0080*/                   BRA.U !UP0, 0x20 ;                       /* 0xfffffffd08e47547 */
        /*0090*/                   EXIT ;                                   /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                                /* 0xfffffffc00fc7947 */
        /*00b0*/                   NOP;                                     /* 0x0000000000007918 */
"""


def listing(*lines):
    """SASS without encodings, one instruction each 16 bytes."""
    return "".join(f"        /*{16 * i:04x}*/    {line} ;\n" for i, line in enumerate(lines))


def test_predicates_modifiers_and_encodings_are_read():
    code = parse_sass(SASS, "forward")
    assert [i.address for i in code] == list(range(0, 0xC0, 16))
    assert [i.kind for i in code] == [
        *("constant", "control", "tensor core", "integer", "EX2", "FADD", "move", "predicate"),
        *("control",) * 4,
    ]
    assert code[2].opcode == "HGMMA.64x64x16.F32.BF16"
    assert code[2].operands == "R24, gdesc[UR8], R24, gsb0"
    assert code[5].operands == "R2, -R2.reuse, -RZ"


def test_jumps_are_read():
    code = parse_sass(SASS, "forward")
    assert {i.address: (i.target, i.falls_through) for i in code if i.kind == "control"} == {
        0x10: (0x90, True),
        0x80: (0x20, True),
        0x90: (None, False),
        0xA0: (0xA0, False),
        0xB0: (None, True),
    }


def test_scheduling_notes_are_no_operands():
    """As cuobjdump of Triton 3.6 writes them for sm_120."""
    code = parse_sass(listing("FADD R0, R1, R2   &wr=0x1   ?trans1", "@!P0 BRA 0x0  &req={2} ?trans5", "EXIT  ?trans5"))
    assert [i.operands for i in code] == ["R0, R1, R2", "0x0", ""]
    assert code[1].target == 0


def test_one_function_is_read():
    assert [i.opcode for i in parse_sass(SASS)] == ["EXIT"]
    with pytest.raises(ValueError, match=r"function: expected one of helper, forward, got 'backward'"):
        parse_sass(SASS, "backward")


def test_a_loop_is_its_back_edge_and_no_trap_is_a_loop():
    (loop,) = inner_loops(parse_sass(SASS, "forward"))
    assert (loop.start, loop.end) == (0x20, 0x80)
    assert loop.counts == dict.fromkeys(("tensor core", "EX2", "FADD", "predicate", "move", "control", "integer"), 1)


def test_nothing_has_no_loops():
    assert inner_loops(()) == ()


def test_only_innermost_loops_count():
    code = parse_sass(
        listing(
            "MOV R0, RZ",
            "FADD R1, R1, R1",  # 0x10: outer
            "FMUL R2, R2, R2",  # 0x20: first inner
            "@P0 BRA 0x20",
            "FFMA R2, R2, R2, R2",  # 0x40: second inner
            "@P1 BRA 0x40",
            "@P2 BRA 0x10",
            "EXIT",
        )
    )
    assert [(loop.start, loop.end) for loop in inner_loops(code)] == [(0x20, 0x30), (0x40, 0x50)]


def test_a_wait_out_of_line_neither_hides_nor_makes_a_loop():
    code = parse_sass(
        listing(
            "MOV R0, RZ",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R4",  # 0x10: the loop begins
            "@!P0 BRA 0x60",
            "MUFU.EX2 R2, R2",
            "@P1 BRA 0x10",
            "EXIT",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R4",  # 0x60: polled again
            "@!P0 BRA 0x60",
            "BRA 0x30",  # back to a lower address, and yet no loop
        )
    )
    (loop,) = inner_loops(code)
    assert (loop.start, loop.end) == (0x10, 0x40)
    assert len(loop.instructions) == 7


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("MUFU.RCP", "RCP"),
        ("MUFU.RCP64H", "other MUFU"),
        ("MUFU.TANH", "TANH"),
        ("MUFU.LG2", "LG2"),
        ("FFMA2", "FF2"),
        ("FMUL.FTZ", "FMUL"),
        ("DFMA", "float64"),
        ("DEPBAR.LE", "barrier"),
        ("LDGDEPBAR", "barrier"),
        ("LDGSTS.E.BYPASS.128", "LDGSTS"),
        ("LDG.E.128", "LDG"),
        ("LDSM.16.M88.4", "LDS"),
        ("UTMALDG.2D", "TMA"),
        ("LDL.LU", "LDL"),
        ("STL.128", "STL"),
        ("RED.E.ADD.F32.FTZ.RN", "atomic"),
        ("REDUX.SUM", "shuffle"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"),
        ("IMMA.16832.S8.S8", "tensor core"),
        ("IMAD.WIDE", "integer"),
        ("HSETP2.GT.AND", "predicate"),
        ("WARPGROUP.DEPBAR.LE", "barrier"),
    ],
)
def test_opcodes_have_their_class(opcode, kind):
    assert parse_sass(listing(f"{opcode} R0, R1"))[0].kind == kind


@pytest.mark.parametrize(
    ("line", "work"),
    [
        ("HMMA.16816.F32.BF16 R4, R4, R8, RZ", ("16-bit", 2 * 16 * 8 * 16 * 8)),
        ("HMMA.1688.F32.TF32 R4, R4, R8, RZ", ("tf32", 2 * 16 * 8 * 8 * 8)),
        ("HMMA.16816.F16 R4, R4, R8, RZ", None),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", ("16-bit", 2 * 64 * 128 * 16 * 2)),
        ("QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24", ("8-bit", 2 * 64 * 64 * 32 * 2)),
        ("UTCHMMA gdesc[UR8], gdesc[UR9], tmem[UR1], tmem[UR4], idesc[UR5], UPT", ("16-bit", 2 * 128 * 64 * 16)),
        ("UTCHMMA gdesc[UR8], gdesc[UR9], tmem[UR1], tmem[UR4], idesc[UR6], UPT", None),
        ("UTCHMMA.2CTA gdesc[UR8], gdesc[UR9], tmem[UR1], tmem[UR4], idesc[UR5], UPT", None),
    ],
)
def test_tensor_core_work_of_a_block_of_eight_warps(line, work):
    code = parse_sass(listing("UMOV UR6, 0x8100490", "UMOV UR5, 0x8100490", "ULDC UR6, c[0x0][0x8]", line))
    assert tensor_work(code[-1], warps=8) == work


def test_amd_assembly_is_read():
    code = parse_amdgcn(
        """
	.text
forward:                                ; @forward
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
	v_exp_f32_e32 v2, v2
	v_pk_fma_f32 v[2:3], v[2:3], v[4:5], v[6:7]
	scratch_store_dword off, v2, s32 offset:4 ; 4-byte Folded Spill
	ds_read_b64 v[4:5], v6
	v_cndmask_b32_e64 v1, v2, v3, vcc
	s_waitcnt lgkmcnt(0)
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	v_add_f64 v[0:1], v[0:1], v[2:3]
	s_endpgm
.Lfunc_end0:
	s_nop 0
"""
    )
    assert [i.kind for i in code] == [
        *("constant", "tensor core", "EX2", "FF2", "STL", "LDS", "predicate", "barrier", "control"),
        *("float64", "control"),
    ]
    (loop,) = inner_loops(code)
    assert (loop.start, loop.end) == (1, 8)
    assert tensor_work(code[1], warps=4) == ("16-bit", 2 * 32 * 32 * 8 * 4)


def test_importing_inspection_needs_no_triton():
    program = "import sys; sys.modules['triton'] = None; import swat_flex.inspection"
    subprocess.run([sys.executable, "-c", program], check=True)
