"""The kernels as Python sees them: a call described in C, and the functions of the built library."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swat_flex.backends.cpp.build import BuildError, Built, build

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4))


TENSORS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
_POINTERS = ("slopes", "logit_bias", "ids", "length", "per_head", "workspace", "region")
_NUMBERS = (
    *("ids_stride", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "left", "right"),
    *("threads", "block", "tile"),
)


class Call(ctypes.Structure):
    """`struct Call` of kernels/call.h, field by field."""

    _fields_ = (
        *((name, _Tensor) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


@functools.cache
def _load() -> Built | BuildError:
    try:
        built = build()
    except BuildError as error:
        return error
    for name in ("swat_forward", "swat_backward", "swat_decode"):
        getattr(built.library, name).restype = None
        getattr(built.library, f"{name}_workspace").restype = ctypes.c_int64
    return built


def trouble() -> str | None:
    """Say why there is no library; None where there is one, built now if need be. A trace sees a constant."""
    built = _load()
    return str(built) if isinstance(built, BuildError) else None


# A trace runs it and does not trace it: torch.compiler.assume_constant_result, without importing the compiler for it.
trouble._dynamo_marked_constant = True  # type: ignore[attr-defined]


def built() -> Built:
    """Return the library.

    Raises:
        NotImplementedError: there is none; says why.
    """
    found = _load()
    if isinstance(found, BuildError):
        raise NotImplementedError(f"backend='cpp': {found}")
    return found


def describe() -> str:
    """Say in one line which compiler, what width of vectors and what time of building; or why there is no library."""
    found = _load()
    if isinstance(found, BuildError):
        return str(found)
    bits = 32 * found.library.swat_vector_width()
    when = f"built in {found.seconds:.1f} s" if found.seconds else "kept from an earlier build"
    return f"{found.compiler}, vectors of {bits} bits, {when}"


@functools.cache
def _region() -> int | None:
    """The function by which torch's own OpenMP starts a parallel region; None where torch runs on something else.

    A second OpenMP would bring a second pool of threads, and each pool's idle threads spin for a while in the other's
    way: whoever mixes torch's operators with ours would pay at every change.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def describe_call(tensors: dict[str, Tensor], per_head: dict[str, Tensor | None], **numbers: Any) -> Call:
    """Fill in a call, but for the workspace and the parallel region.

    Args:
        tensors: four axes each, by the names of `struct Call`; q, k and v decide its sizes and type.
        per_head: contiguous tensors or None, by the names of its pointers.
        numbers: all the rest.
    """
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, q_heads, q_len, head_dim = q.shape
    call = Call(
        batch=batch, q_heads=q_heads, kv_heads=k.shape[1], q_len=q_len, kv_len=k.shape[2], head_dim=head_dim,
        value_dim=v.shape[3], type=TYPES[q.dtype], threads=torch.get_num_threads(), **numbers,
    )  # fmt: skip
    for name, x in tensors.items():
        setattr(call, name, _Tensor(x.data_ptr(), x.stride()))
    for name, x in per_head.items():  # type: ignore[assignment]  # None is a null pointer
        setattr(call, name, None if x is None else x.data_ptr())
    return call


def run(function: str, tensors: dict[str, Tensor], per_head: dict[str, Tensor | None], **numbers: Any) -> None:
    """Call "swat_forward", "swat_backward" or "swat_decode"; the rest is `describe_call`'s."""
    library = built().library
    call = describe_call(tensors, per_head, region=_region(), **numbers)
    size = getattr(library, f"{function}_workspace")(ctypes.byref(call))
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    call.workspace = workspace.data_ptr()
    getattr(library, function)(ctypes.byref(call))
