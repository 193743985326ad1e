"""The kernels' inline assembly, evaluated on arrays: Triton's interpreter has none."""

import re

import numpy as np

FLOAT32 = np.float32


def flushed(x):
    """Subnormals as 0, which .ftz makes of them."""
    return np.where(np.abs(x) < np.finfo(FLOAT32).tiny, np.copysign(FLOAT32(0), x), x)


def fused(a, b, c):
    return (a.astype(np.float64) * b + c).astype(FLOAT32)


OPERATIONS = {
    "add.f32": np.add,
    "mul.f32": np.multiply,
    "fma.rn.f32": fused,
    "min.NaN.f32": np.minimum,
    "ex2.approx.ftz.f32": lambda x: flushed(np.exp2(flushed(x))),
    "rcp.approx.ftz.f32": lambda x: flushed(FLOAT32(1) / flushed(x)),
}


def evaluate(asm, inputs, outputs):
    """What `asm` leaves in $0 … $outputs − 1, from float32 arrays in the operands that follow."""
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}

    def value(operand):
        if operand.startswith("0f"):
            return np.frombuffer(bytes.fromhex(operand[2:]), ">f4")[0].astype(FLOAT32)
        return registers[operand]

    with np.errstate(all="ignore"):
        for opcode, operands in re.findall(r"([a-z]\S*) ([^;{}]+);", asm.replace(".reg .f32", "reg")):
            if opcode == "reg":
                continue
            target, *sources = operands.split(", ")
            registers[target] = OPERATIONS[opcode](*(value(x) for x in sources)).astype(FLOAT32)
    return [registers[f"${i}"] for i in range(outputs)]


def in_threads(x):
    """`[8, …]`: what a thread holds of eight elements of a matrix product's tile `[R, C]`, both multiples of 16.

    Two columns of a row, the same two of the row eight below, and both again eight columns on.
    """
    rows, columns = x.shape
    return x.reshape(rows // 16, 2, 8, columns // 16, 2, 4, 2).transpose(4, 1, 6, 0, 2, 3, 5).reshape(8, -1)


def in_tile(x, shape):
    """The inverse of `in_threads`."""
    rows, columns = shape
    x = x.reshape(2, 2, 2, rows // 16, 8, columns // 16, 4)
    return x.transpose(3, 1, 4, 5, 0, 6, 2).reshape(shape)


def elementwise(asm, inputs, pack):
    """tl.inline_asm_elementwise of float32 arrays of one shape, with one result."""
    if pack == 1:
        return evaluate(asm, inputs, 1)[0]
    operands = [register for x in inputs for register in in_threads(x)]
    return in_tile(np.stack(evaluate(asm, operands, pack)), inputs[0].shape)
