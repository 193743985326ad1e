"""Registers that PTX reads and never writes, in PTX written by hand."""

import pytest

from swat_flex.inspection import undefined_registers

HEAD = """
.version 8.7
.visible .entry kernel(
	.param .u64 .ptr .global .align 16 kernel_param_0
)
.reqntid 128
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<12>;
	.reg .b64 	%rd<4>;
	.loc	1 12 0                          // kernel.py:12:0
$L__func_begin0:
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
"""


def undefined(*lines):
    return undefined_registers(HEAD + "\n".join(f"\t{line}" for line in lines) + "\n\tret;\n}\n")


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["st.global.b32 [%rd3], %r1;"], ()),
        (["st.global.b32 [%rd3], %r2;"], ("%r2",)),
        (["add.s32 %r2, %r3, %r1;", "st.global.b32 [%rd3], %r2;"], ("%r3",)),
        (["@%p1 st.global.b32 [%rd3], %r1;"], ("%p1",)),
        (["setp.eq.s32 %p1|%p2, %r1, 0;", "@!%p2 bra $L__BB0_1;", "$L__BB0_1:"], ()),
        (["ld.global.v2.b32 {%r2, %r3}, [%rd3];", "st.global.v2.b32 [%rd3], {%r2, %r4};"], ("%r4",)),
        (["mov.b64 {%r2, %r3}, %rd1;", "cp.async.cg.shared.global [%r2], [%rd1], 16, %r5;"], ("%r5",)),
        (["// add.s32 %r2, %r3, %r1;"], ()),
        # Assembly in braces: $0 … are registers of the kernel, names without a percent sign its own.
        (["// begin inline asm", "{ .reg .f32 a; ex2.approx.ftz.f32 a, %r1; rcp.approx.ftz.f32 %r2, a; }"], ()),
        (["{ .reg .f32 a; ex2.approx.ftz.f32 a, %r7; rcp.approx.ftz.f32 %r2, a; }"], ("%r7",)),
        (["bar.sync 0, %r9;"], ("%r9",)),
        (["mov.b64 %rd0, {%r1, %r5};", "mov.b64 {%r2, _}, %rd0;"], ()),
        (["mov.b64 %rd0, {%r1, %r5};", "mov.b64 {_, %r2}, %rd0;"], ("%r5",)),
        (["mov.b64 %rd0, {%r1, %r5};", "mov.b64 {%r2, _}, %rd0;", "st.global.b64 [%rd3], %rd0;"], ("%r5",)),
        (["mov.b64 %rd0, {%r1, %r5};", "mov.b64 {%r2, _}, %rd0;", "add.s32 %r6, %r5, %r1;"], ("%r5",)),
        (["mov.b64 %rd0, {%r1, %r5};", "add.f32x2 %rd4, %rd0, %rd2;", "mov.b64 {%r2, _}, %rd4;"], ()),
        (["mov.b64 %rd0, {%r1, %r5};", "add.f32x2 %rd4, %rd0, %rd2;", "mov.b64 {%r2, %r3}, %rd4;"], ("%r5",)),
        (["mov.b64 %rd0, {%r1, %r5};", "add.s64 %rd4, %rd0, %rd2;", "mov.b64 {%r2, _}, %rd4;"], ("%r5",)),
        (["mma.sync.m16n8k16 {%r2, %r3}, {%r1, %r6}, {%r1}, {%r2, %r3};"], ("%r6",)),
    ],
)
def test_registers_read_and_never_written_are_named(lines, names):
    assert undefined(*lines) == names


def test_they_come_in_the_order_of_their_first_use():
    assert undefined("add.s32 %r2, %r9, %r5;", "add.s32 %r3, %r4, %r9;") == ("%r9", "%r5", "%r4")
