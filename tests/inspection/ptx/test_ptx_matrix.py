"""Matrix instructions of the emulated PTX against products by numpy, with the fragments of the PTX manual."""

import numpy as np
import pytest
import torch

pytest.importorskip("numpy")

from handwritten import execute, words

from swat_flex.inspection.ptx import Fault, Global

LANE = np.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4  # the manual's groupID and threadID_in_group
X = words(20)
# Each warp has 512 bytes of shared memory; a thread names the row of its number.
ROWS = """and.b32 %r7, %r1, 31; shl.b32 %r8, %r7, 4; shr.u32 %r9, %r1, 5; shl.b32 %r9, %r9, 9; add.s32 %r8, %r8, %r9;
mov.u32 %r9, global_smem; add.s32 %r8, %r8, %r9; add.s32 %r10, %r2, 1; add.s32 %r11, %r2, 2; add.s32 %r12, %r2, 3;
stmatrix.sync.aligned.m8n8.x4{store}.shared.b16 [%r8], {{%r2, %r10, %r11, %r12}};
{load}"""


def test_stmatrix_puts_two_columns_of_row_g_where_thread_4g_says():
    body = ROWS.format(store="", load="ld.shared.b32 %r3, [%r8+4];")
    found, _ = execute(body, X)
    for warp in range(2):
        x = X[32 * warp : 32 * warp + 32]
        # Thread t names row t: of matrix t / 8 row t % 8, whose second word is that of thread 4·(t % 8) + 1.
        np.testing.assert_array_equal(
            found[32 * warp : 32 * warp + 32], x[LANE % 8 * 4 + 1] + (LANE // 8).astype(np.uint32)
        )


def test_ldmatrix_gives_thread_4g_plus_c_two_columns_of_row_g():
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r13, %r14, %r3, %r15}, [%r8];"
    np.testing.assert_array_equal(execute(ROWS.format(store="", load=load), X)[0], X + np.uint32(2))


def test_transposed_matrices():
    load = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r3, %r14, %r13, %r15}, [%r8];"
    found, _ = execute(ROWS.format(store="", load=load), X)
    matrix = X[:32].view(np.uint16).reshape(8, 8)
    wanted = np.stack([matrix.T[GROUP, 2 * IN_GROUP], matrix.T[GROUP, 2 * IN_GROUP + 1]], 1)
    np.testing.assert_array_equal(found[:32], np.ascontiguousarray(wanted).view(np.uint32)[:, 0])
    both = ROWS.format(store=".trans", load=load)
    np.testing.assert_array_equal(execute(both, X)[0], X)


def bits(x, kind):
    """Storage of a matrix rounded to a type, and the rounded numbers."""
    if kind == "tf32":
        stored = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return stored, stored.view(np.float32)
    y = torch.from_numpy(x).to(torch.bfloat16 if kind == "bf16" else torch.float16)
    return y.view(torch.int16).numpy().view(np.uint16), y.float().numpy()


def registers(stored, row, column):
    """One register per thread with the elements at (row, column) and what follows along `column`'s axis."""
    if stored.dtype == np.uint32:
        return stored[row, column]
    return np.ascontiguousarray(np.stack([stored[row, column], stored[row, column + 1]], 1)).view(np.uint32)[:, 0]


@pytest.mark.parametrize(
    ("kind", "shape"), [("bf16", "m16n8k16"), ("f16", "m16n8k16"), ("f16", "m16n8k8"), ("tf32", "m16n8k8")]
)
def test_mma_multiplies_the_manuals_fragments(kind, shape):
    rng, depth = np.random.default_rng(21), int(shape.rpartition("k")[2])
    a, a_real = bits(rng.standard_normal((16, depth)).astype(np.float32), kind)
    b, b_real = bits(rng.standard_normal((depth, 8)).astype(np.float32), kind)
    per = 1 if kind == "tf32" else 2
    step = 4 * per
    left = [registers(a, GROUP + 8 * (k % 2), per * IN_GROUP + step * (k // 2)) for k in range(2 * (depth // step))]
    right = [registers(np.ascontiguousarray(b.T), GROUP, per * IN_GROUP + step * k) for k in range(depth // step)]
    memory = np.stack([*left, *right])
    loads = " ".join(f"ld.global.b32 %r{10 + k}, [%rd4+{128 * k}];" for k in range(len(memory)))
    names = [f"%r{10 + k}" for k in range(len(memory))]
    operands = f"{{{', '.join(names[: len(left)])}}}, {{{', '.join(names[len(left) :])}}}"
    for d in range(4):
        sums = "mov.b32 %r20, 0f3F800000; "
        body = f"{loads} {sums} mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%r21, %r22, %r23, %r24}}, " \
            f"{operands}, {{%r20, %r20, %r20, %r20}}; mov.b32 %r3, %r{21 + d};"  # fmt: skip
        found, _ = execute(body, memory, threads=32)
        wanted = (a_real @ b_real + 1)[GROUP + 8 * (d // 2), 2 * IN_GROUP + d % 2]
        np.testing.assert_allclose(found.view(np.float32), wanted, rtol=1e-5, atol=1e-5)


def test_mma_needs_a_whole_warp():
    body = """setp.lt.u32 %p1, %r1, 40; mov.b32 %r20, 0; @%p1 mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32
    {%r21, %r22, %r23, %r3}, {%r2, %r2}, {%r2}, {%r20, %r20, %r20, %r20};"""
    with pytest.raises(Fault, match="without all 32 threads"):
        execute(body, X)


def image(stored, swizzle, major):
    """A wgmma operand `[outer, 16]` as it lies in shared memory, with its leading and stride offsets in bytes.

    Pieces of 16 bytes are 8 numbers along K (major "k") or along the other axis ("mn"). Without swizzle 8 pieces lie
    one behind the other; with it they lie in rows of 32, 64 or 128 bytes, piece c of row r at c XOR the row's number.
    """
    outer, row = len(stored), swizzle or 16
    per, by = row // 16, {0: 1, 32: 4, 64: 2, 128: 1}[swizzle]
    if major == "k":
        lead, stride = (128 * (outer // 8), 128) if swizzle == 0 else (0, 8 * row)
        size = outer * 32 if swizzle == 0 else outer * row
    elif swizzle == 0:
        lead, stride = 128 * (outer // 8), 128
        size = outer * 32
    else:
        lead, stride = 8 * row, 8 * row * (-(-outer // (per * 8)))
        size = 2 * stride
    data = np.zeros(size, np.uint8)
    for i in range(outer):
        for k in range(16):
            if major == "k":
                piece, r, block, within = k // 8, i % 8, i // 8, k % 8
                at = piece * lead + block * stride + r * 16 if swizzle == 0 else \
                    block * stride + r * row + (piece ^ (r // by)) * 16  # fmt: skip
            else:
                piece, r, within = i // 8, k % 8, i % 8
                at = piece * stride + k // 8 * lead + r * 16 if swizzle == 0 else \
                    piece // per * lead + k // 8 * stride + r * row + (piece % per ^ (r // by)) * 16  # fmt: skip
            data[at + 2 * within : at + 2 * within + 2] = stored[i, k : k + 1].view(np.uint8)
    return data, lead, stride


def descriptor(address, lead, stride, swizzle):
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return address >> 4 | (lead >> 4) << 16 | (stride >> 4) << 32 | mode << 62


def multiply(swizzles, majors, n=64, kind="bf16", edit=lambda body: body):
    """(what wgmma gives `[64, n]`, what numpy gives) for random operands in shared memory."""
    rng = np.random.default_rng(22)
    a, a_real = bits(rng.standard_normal((64, 16)).astype(np.float32), kind)
    b, b_real = bits(rng.standard_normal((n, 16)).astype(np.float32), kind)
    (one, *at_a), (two, *at_b) = (image(x, s, m) for x, s, m in zip((a, b), swizzles, majors, strict=True))
    begin = -(-len(one) // 1024) * 1024
    whole = np.zeros(begin + -(-len(two) // 1024) * 1024, np.uint8)
    whole[: len(one)], whole[begin : begin + len(two)] = one, two
    out, memory = np.zeros(64 * n, np.float32), Global()
    base = memory.add("sums", out.view(np.uint8))
    sums = ", ".join(f"%r{100 + i}" for i in range(n // 2))
    copy = " ".join(
        f"ld.global.b32 %r10, [%rd4+{512 * k}]; st.shared.b32 [%r5+{512 * k}], %r10;" for k in range(len(whole) // 512)
    )
    store = " ".join(f"st.global.b32 [%rd9+{4 * i}], %r{100 + i};" for i in range(n // 2))
    d_a, d_b = descriptor(1024, *at_a, swizzles[0]), descriptor(1024 + begin, *at_b, swizzles[1])
    flips = f"{int(majors[0] == 'mn')}, {int(majors[1] == 'mn')}"
    body = f"""mov.u32 %r5, global_smem; shl.b32 %r6, %r1, 2; add.s32 %r5, %r5, %r6; {copy}
    fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd10, {d_a}; mov.b64 %rd11, {d_b}; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{sums}}}, %rd10, %rd11, 0, 1, 1, {flips};
    mov.pred %p1, -1;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{sums}}}, %rd10, %rd11, %p1, 1, 1, {flips};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %rd9, %r1, {2 * n}; add.s64 %rd9, %rd9, {base}; {store} mov.u32 %r3, 0;"""
    execute(edit(body), whole, threads=128, shared=len(whole), memory=memory)
    thread, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    found = np.zeros((64, n), np.float32)
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    found[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = out.reshape(128, n // 2)
    return found, 2 * a_real @ b_real.T


@pytest.mark.parametrize("major_b", ["k", "mn"])
@pytest.mark.parametrize("major_a", ["k", "mn"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_wgmma_multiplies_what_its_descriptors_name(swizzle, major_a, major_b):
    found, wanted = multiply((swizzle, swizzle), (major_a, major_b))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "kind"), [(8, "f16"), (16, "bf16"), (128, "f16"), (256, "bf16")])
def test_widths_of_wgmma(n, kind):
    found, wanted = multiply((128, 128), ("k", "k"), n, kind)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


WRONG = {
    "without a proxy fence": ("fence.proxy.async.shared::cta;", ""),
    "race: a product reads": ("bar.sync 0;", ""),
    "ends while products run": ("wgmma.wait_group.sync.aligned 0;", "ret;"),
    "touches a register that a product in flight writes": ("wgmma.wait_group", "mov.b32 %r100, 0; wgmma.wait_group"),
    "a product in flight reads": ("wgmma.wait_group", "bar.sync 0; st.shared.b32 [%r5], %r1; wgmma.wait_group"),
}


@pytest.mark.parametrize("words_of_the_fault", WRONG)
def test_a_product_that_is_not_waited_for_or_fenced(words_of_the_fault):
    old, new = WRONG[words_of_the_fault]
    with pytest.raises(Fault, match=words_of_the_fault):
        multiply((128, 128), ("k", "k"), edit=lambda body: body.replace(old, new))


# wgmma.fence, wgmma.commit_group, wgmma.wait_group and wgmma.mma_async of the PTX manual: what each must stand between.
FENCE, COMMIT, WAIT = (f"wgmma.{x}.sync.aligned" for x in ("fence", "commit_group", "wait_group"))
LAST = f"{WAIT} 0;"
ORDER = {  # the words of the fault, or None; what is replaced, by what
    "the first product without a fence": ("written without wgmma.fence", f"{FENCE};", ""),
    "a sum written after the fence": ("written without wgmma.fence", f"{FENCE};", f"{FENCE}; mov.b32 %r100, 0;"),
    "a sum read after the fence": (None, f"{FENCE};", f"{FENCE}; add.f32 %r90, %r100, 0f00000000;"),
    "a sum written before the fence": (None, f"{FENCE};", f"mov.b32 %r100, 0; {FENCE};"),
    "another register written after it": (None, f"{FENCE};", f"{FENCE}; mov.b32 %r90, 0;"),
    "a sum written by some threads": (
        "written without wgmma.fence", f"{FENCE};",
        f"{FENCE}; setp.gt.u32 %p2, %r1, 100; @%p2 mov.b32 %r100, 0;",
    ),
    "a sum moved from what was there before it": (
        None, f"{FENCE};", f"mov.b32 %r90, 0; {FENCE}; mov.b32 %r100, %r90;",
    ),
    "a sum moved from what was written after it": (
        "written without wgmma.fence", f"{FENCE};", f"{FENCE}; mov.b32 %r90, 0; mov.b32 %r100, %r90;",
    ),
    "a sum read before the wait": ("a product in flight writes", LAST, f"mov.b32 %r90, %r100; {LAST}"),
    "the products in no group": ("a product in flight writes", f"{COMMIT};", ""),
    "a wait for all groups but one": ("a product in flight writes", LAST, f"{WAIT} 1;"),
    "a wait for all groups but one, of two": (None, LAST, f"{COMMIT}; {WAIT} 1;"),
    "no wait": ("a product in flight writes", f"{WAIT} 0;", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDER)
def test_products_and_other_accesses_to_their_registers_are_ordered(name):
    fault, old, new = ORDER[name]
    edit = lambda body: body.replace(old, new, 1)  # noqa: E731
    if fault is None:
        multiply((128, 128), ("k", "k"), edit=edit)
        return
    with pytest.raises(Fault, match=fault):
        multiply((128, 128), ("k", "k"), edit=edit)


# Two products of 64 × 8 with the left operand in registers; %rd11 names the right one, which lies in shared memory.
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{sums}}}, {{{left}}}, %rd11, 0, 1, 1, 0;"
ONE, TWO = "%r100, %r101, %r102, %r103", "%r104, %r105, %r106, %r107"
LEFT, SHIFTED = "%r110, %r111, %r112, %r113", "%r101, %r102, %r103, %r104"
IN_REGISTERS = {  # the words of the fault, or None; the instructions between operands that are there and the last wait
    "an operand written after the fence, which ptxas orders": (None, f"{FENCE}; mov.b32 %r110, 0;", [(ONE, LEFT)]),
    "an operand written after the last group": (
        "written without", f"{FENCE};", [(ONE, LEFT), f"{COMMIT}; {WAIT} 0; mov.b32 %r110, 0;", (ONE, LEFT)]
    ),
    "an operand written and fenced after the last group": (
        None, f"{FENCE};", [(ONE, LEFT), f"{COMMIT}; {WAIT} 0; mov.b32 %r110, 0; {FENCE};", (ONE, LEFT)]
    ),
    "an operand written in flight": ("in flight reads", f"{FENCE};", [(ONE, LEFT), f"{COMMIT}; mov.b32 %r110, 0;"]),
    "an operand read in flight": ("in flight reads", f"{FENCE};", [(ONE, LEFT), f"{COMMIT}; add.s32 %r90, %r110, 1;"]),
    "an operand moved elsewhere in flight": (None, f"{FENCE};", [(ONE, LEFT), f"{COMMIT}; mov.b32 %r90, %r110;"]),
    "an operand of two products": (None, f"{FENCE};", [(ONE, LEFT), (TWO, LEFT)]),
    "sums of two products": (None, f"{FENCE};", [(ONE, LEFT), (ONE, LEFT)]),
    "sums that overlap": ("another product's sums", f"{FENCE};", [(ONE, LEFT), (SHIFTED, LEFT)]),
    "sums that overlap, behind a fence": ("another product's sums", f"{FENCE};", [(ONE, LEFT), f"{FENCE};",
                                                                                    (SHIFTED, LEFT)]),
    "sums that overlap, behind wait and fence": (None, f"{FENCE};", [(ONE, LEFT), f"{COMMIT}; {WAIT} 0; {FENCE};",
                                                                     (SHIFTED, LEFT)]),
    "an operand that a product in flight writes": ("in flight writes", f"{FENCE};", [(ONE, LEFT), (TWO, ONE)]),
    "sums that a product in flight reads": ("in flight reads", f"{FENCE};", [(ONE, LEFT), (LEFT, TWO)]),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_REGISTERS)
def test_operands_in_registers_belong_to_the_product_until_the_wait(name):
    fault, begin, rest = IN_REGISTERS[name]
    zeros = " ".join(f"mov.b32 %r{n}, 0;" for n in (*range(100, 108), *range(110, 114)))
    products = " ".join(x if isinstance(x, str) else PRODUCT.format(sums=x[0], left=x[1]) for x in rest)
    body = f"""mov.u32 %r5, global_smem; shl.b32 %r6, %r1, 2; add.s32 %r5, %r5, %r6; st.shared.b32 [%r5], %r2;
    fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd11, {descriptor(1024, 128, 128, 0)}; {zeros}
    {begin} {products} {COMMIT}; {WAIT} 0; mov.b32 %r3, %r100;"""
    if fault is None:
        execute(body, words(23, 128), threads=128)
        return
    with pytest.raises(Fault, match=fault):
        execute(body, words(23, 128), threads=128)
