"""Kernels written by hand: each thread reads words, computes one, and stores it."""

import numpy as np

from swat_flex.inspection.ptx import Global, Machine, parse

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.file 1 "/somewhere/kernel.py"
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1) .reqntid {threads} {{
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<400>; .reg .b64 %rd<20>;
ld.param.b64 %rd1, [k_param_0]; ld.param.b64 %rd2, [k_param_1];
mov.u32 %r1, %tid.x; mov.u32 %r90, %ctaid.x; mov.u32 %r91, %ntid.x; mad.lo.s32 %r92, %r90, %r91, %r1;
mul.wide.u32 %rd3, %r92, {size}; add.s64 %rd4, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3;
"""
LOAD = {4: "ld.global.b32 %r2, [%rd4];", 8: "ld.global.b64 %rd5, [%rd4];"}
STORE = {4: "st.global.b32 [%rd2], %r3;", 8: "st.global.b64 [%rd2], %rd6;"}


def execute(body, x, *, threads=64, blocks=1, shared=1024, size=4, memory=None, more=()):
    """Run `body` between a load of %r2 (or %rd5) and a store of %r3 (or %rd6).

    Args:
        x: what the first pointer, %rd1, points to; %rd4 is the thread's own element.
        size: bytes of an element, 4 or 8.
        more: (name, array) of further regions, which follow x and the output in memory.

    Returns:
        The output as uint32 or uint64, one element per thread, and the machine.
    """
    memory = memory or Global()
    data = np.ascontiguousarray(x).view(np.uint8).reshape(-1)
    out = np.zeros(threads * blocks * size, np.uint8)
    text = HEAD.format(threads=threads, size=size) + LOAD[size] + body + STORE[size] + " ret; }"
    program = parse(text)
    addresses = memory.add("x", data), memory.add("out", out)
    for name, array in more:
        memory.add(name, array)
    machine = Machine(program, shared, memory, (blocks,))
    for parameter, address in zip(program.parameters, addresses, strict=True):
        machine.give(parameter, address)
    machine.run()
    return out.view({4: np.uint32, 8: np.uint64}[size]), machine


def words(seed, count=64):
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)


def floats(seed, count=64):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)
