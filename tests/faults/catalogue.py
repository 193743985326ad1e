"""The faults that the tests must find: what goes wrong when attention is written by hand."""

from planting import Fault

from swat_flex.backends.cpp import library

_OP, _TILES = "backends.banded.op", "backends.banded.tiles"
BANDED = [
    Fault("banded", "mask off by one", _TILES, "self.left_edge] <= left)", "self.left_edge] < left)"),
    Fault("banded", "sign of the slope", _TILES, "else x.to(", "else -x.to("),
    Fault("banded", "missing scale", _TILES, "alpha=self.scale)", "alpha=1.0)"),
    Fault("banded", "wrong key head", _TILES, "x[part[0], part[1], keys].f", "x[part[0], part[1], keys].flip(1).f"),
    Fault("banded", "dropped left edge", _TILES, "bitwise_and_(self.in_left[:n_rows, first:end])", "zero_()"),
    Fault(
        "banded",
        "skipped last tile",
        _TILES,
        "in range(first, last, self.block)]",
        "in range(first, last - 1, self.block)]",
    ),
    Fault("banded", "tanh of 11 bits", _TILES, "x.sigmoid_()", "x.copy_(((x / 2).tanh() * 2048).round() / 4096 + 0.5)"),
    Fault(
        "banded",
        "missing gradient term",
        _TILES,
        "torch.ops.aten.sigmoid_backward.grad_input(x, weights, grad_input=x)",
        "x.mul_(weights)",
    ),
    Fault(
        "banded",
        "dq of the wrong row",
        _OP,
        "dq[part[0], band.q_heads(part), rows]\n                    to.copy_(total.view(to.shape))",
        "dq[part[0], band.q_heads(part), rows]\n                    to.copy_(total.view(to.shape).roll(1, 2))",
    ),
    Fault(
        "banded", "slopes' gradient without distance", _TILES, "(x * self.distances(rows, keys)).sum", "(x * 1.0).sum"
    ),
    Fault("banded", "dk of one query head", _TILES, ".sum(1)\n        to.add_", "[:, 0]\n        to.add_"),
    # As small as the fuzz's rules see; no law does.
    Fault("banded", "sum in the wrong precision", _TILES, "*to.shape[1:]).sum(1)", "*to.shape[1:]).half().sum(1)"),
    Fault(
        "banded",
        "4 units of the last place in the tail",
        _TILES,
        "self.hide(x.sigmoid_(), part",
        "self.hide(x.sigmoid_().mul_(1 + 2.0**-21 * (x < 0.12)), part",
    ),
    Fault(
        "banded",
        "a key at a tile's border lost by one row in 1,000",
        _TILES,
        "        if first < self.left_edge:",
        "        if rows.start == 960 and 0 <= (lost := self.offset + 959 - keys.start) < last - first:\n"
        "            bits[-1, -1, 63, lost] = 0\n"
        "        if first < self.left_edge:",
    ),
    Fault(
        "banded",
        "a key at a tile's border lost by one row",
        _TILES,
        "        if first < self.left_edge:",
        "        if rows.start == 128 and 0 <= (lost := self.offset + 127 - keys.start) < last - first:\n"
        "            bits[-1, -1, 0, lost] = 0\n"
        "        if first < self.left_edge:",
    ),
]

_TRITON = "backends.triton."
TRITON = [
    Fault("triton", "mask off by one", _TRITON + "tiles", "j[None, :] >= (i - left", "j[None, :] > (i - left"),
    Fault(
        "triton",
        "sign of the slope",
        _TRITON + "tiles",
        "tl.load(slopes + i_h) * BASE",
        "tl.load(slopes + i_h) * -BASE",
    ),
    Fault("triton", "missing scale", _TRITON + "tiles", "return scale * BASE,", "return 0.0 * scale + BASE,"),
    Fault(
        "triton",
        "wrong key head",
        _TRITON + "forward",
        "head_of(k, k_strides, i_b, i_h // group)",
        "head_of(k, k_strides, i_b, i_h % (q_heads // group))",
    ),
    Fault(
        "triton",
        "dropped left edge",
        _TRITON + "forward",
        "start = tl.maximum(first - left, 0) // BN * BN",
        "start = tl.cdiv(tl.maximum(first - left, 0), BN) * BN",
    ),
    Fault(
        "triton",
        "skipped last tile",
        _TRITON + "forward",
        "stop = tl.minimum(first2 + BM + right, kv_len)",
        "stop = tl.minimum(first2 + BM + right, kv_len) // BN * BN",
    ),
    Fault(
        "triton",
        "tanh of 11 bits",
        _TRITON + "sigmoid",
        "return 1.0 / (ONE + tl.exp2(y))",
        "return tl.floor(4096.0 * ONE / (ONE + tl.exp2(y))) / (4096.0 * ONE)",
    ),
    Fault("triton", "missing gradient term", _TRITON + "backward", "* (w - w * w)", "* w"),
    Fault(
        "triton",
        "dq of the wrong row",
        _TRITON + "backward",
        "acc * (scale / up), row,",
        "acc * (scale / up), row + 1,",
    ),
    Fault(
        "triton",
        "key gradients skip a tile",
        _TRITON + "backward",
        "stop = tl.minimum(at + BN + left, q_len)",
        "stop = tl.minimum(at + BN + left, q_len) // BM * BM",
    ),
]

FLEX = [
    Fault("flex", "mask off by one", "modifiers", "visible & (distance <= left)", "visible & (distance < left)"),
    Fault("flex", "sign of the slope", "modifiers", "score + _of_head(slopes", "score - _of_head(slopes"),
    Fault(
        "flex",
        "missing scale",
        "backends.flex.programs",
        "score_mod, block_mask, scale,",
        "score_mod, block_mask, 1.0,",
    ),
    Fault("flex", "slope of the wrong head", "modifiers", "return x[h] if", "return x[0] if"),
    Fault("flex", "wrong key head", "backends.flex.op", "with_extra_key(k.float()", "with_extra_key(k.float().flip(1)"),
    Fault(
        "flex",
        "dropped left edge",
        "backends.flex.blocks",
        "- self.sides[0]) // self.block +",
        "- self.sides[0]) // self.block + 1 +",
    ),
    Fault(
        "flex",
        "skipped last tile",
        "backends.flex.blocks",
        "number = visited.sum(-1, dtype=torch.int32)[:, None]",
        "number = (visited.sum(-1, dtype=torch.int32)[:, None] - 1).clamp(min=0)",
    ),
    Fault(
        "flex",
        "tanh of 11 bits",
        "modifiers",
        "    return F.logsigmoid(x)\n\n\ndef biased_score",
        "    return (((x / 2).tanh() * 2048).round() / 4096 + 0.5 + 1e-9).log()\n\n\ndef biased_score",
    ),
    Fault(
        "flex",
        "missing gradient term",
        "modifiers",
        "return grad * cast(Tensor, _sigmoid_of_negative(x))",
        "return grad",
    ),
]

CPP = [
    Fault("cpp", "mask off by one", "tile.h", "(d <= all(left))", "(d < all(left))"),
    Fault("cpp", "sign of the slope", "tile.h", "* all(t.q.slope)", "* all(-t.q.slope)"),
    Fault("cpp", "missing scale", "forward.cpp", "c.head_dim, c.scale)", "c.head_dim, 1.f)"),
    Fault("cpp", "wrong key head", "forward.cpp", "kv_head * group + n % group", "kv_head + n % group * c.kv_heads"),
    Fault("cpp", "dropped left edge", "tile.h", "(d <= all(left)) & (d >= all(-right))", "(d >= all(-right))"),
    Fault(
        "cpp",
        "4 units of the last place in the tail",
        "vector.h",
        "/ (all(1.f) + e);",
        "/ (all(1.f) + e) * (x < all(-2.f) ? all(1.f + 0x1p-21f) : all(1.f));",
    ),
    Fault(
        "cpp",
        "a key at a tile's border lost by one row in 1,000",
        "tile.h",
        "        s = sigmoid(s);\n",
        "        s = sigmoid(s);\n"
        "        if (!(r + i)) s = all((int32_t)t.q.first + (c + n) * VW) + lanes() == all(1000) ? V{} : s;\n",
    ),
    Fault("cpp", "missing gradient term", "backward.cpp", "x[i] *= s * (all(1.f) - s)", "x[i] *= s"),
    Fault(
        "cpp",
        "slopes' gradient without distance",
        "backward.cpp",
        "x[i] * absolute(d + all((float)(i % strip * VW - i / strip)))",
        "x[i]",
    ),
    Fault("cpp", "dq of the last tile alone", "backward.cpp", "c.scale, is_new, dq)", "c.scale, true, dq)"),
    Fault("cpp", "decoding, mask off by one", "decode.cpp", "(distance <= all((", "(distance < all(("),
    Fault("cpp", "decoding, sign of the slope", "decode.cpp", "* all(query[r].slope)", "* all(-query[r].slope)"),
    Fault("cpp", "decoding, missing scale", "decode.cpp", "*= c.scale", "*= 1.f"),
    Fault("cpp", "decoding, order of the ring", "decode.cpp", "(oldest + j) % c.kv_len", "j % c.kv_len"),
    Fault(
        "cpp",
        "decoding, wrong key head",
        "decode.cpp",
        "= kv_head * p.group + r / c.q_len",
        "= kv_head + r / c.q_len * c.kv_heads",
    ),
    Fault("cpp", "decoding, last part lost", "decode.cpp", "i * n < live; i++", "(i + 1) * n < live; i++"),
]

FAULTS = [*BANDED, *TRITON, *FLEX, *(CPP if library.trouble() is None else [])]
