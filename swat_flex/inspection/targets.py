"""What a multiprocessor of each target can hold and do per clock, and the GPUs that are built from it.

Every figure is the vendor's and names its source; None stands where we know of no published figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Rates:
    """What one multiprocessor does per clock.

    Attributes:
        tensor: dense tensor-core FLOP with float32 sums, by operand format ("16-bit", "tf32", "8-bit").
        special: results of a special function (exp2, reciprocal, log2, tanh) in float32.
        float32: results of a float32 add, multiply or fused multiply-add.
        float64: the same in float64.
        issue: warp instructions issued by all schedulers together.
        source: where the figures come from.
    """

    tensor: Mapping[str, int]
    special: int | None
    float32: int | None
    float64: int | None
    issue: int | None
    source: str


@dataclass(frozen=True, slots=True)
class Target:
    """An architecture that Triton compiles for, with the limits that decide occupancy.

    Attributes:
        name: "sm_90", "gfx942".
        backend: Triton's name of the vendor's backend, "cuda" or "hip".
        arch: Triton's name of the architecture.
        warp_size: threads per warp.
        registers: 32-bit registers per multiprocessor; its four schedulers own a quarter each.
        register_step: registers per thread are allocated in multiples of this.
        shared: bytes of shared memory per multiprocessor.
        shared_reserved: bytes that the system takes from `shared` for each resident block.
        tensor_memory: columns of tensor memory per multiprocessor; 0 where there is none.
        max_warps: resident warps per multiprocessor.
        max_blocks: resident blocks per multiprocessor.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    registers: int
    register_step: int
    shared: int
    shared_reserved: int
    tensor_memory: int
    max_warps: int
    max_blocks: int
    rates: Rates = field(repr=False)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A product: the number of its multiprocessors, the clock in Hz at which its published tensor-core peak holds,
    and its memory bandwidth in bytes per second."""

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    source: str


# Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; tensor memory: PTX ISA,
# tcgen05. Results per clock: the same guide, "Throughput of Native Arithmetic Instructions". Tensor-core rates: the
# published dense peak of the products below, divided by multiprocessors and clock. What is no column is the same for
# all of NVIDIA's targets.
_NVIDIA = (
    # capability, shared memory (KiB), tensor memory, warps, blocks; rates: tensor, float32, float64; source of `tensor`
    (80, 164, 0, 64, 32, {"16-bit": 2048, "tf32": 1024}, 64, 32, "NVIDIA A100 datasheet"),
    (86, 100, 0, 48, 16, {"16-bit": 1024, "tf32": 512}, 128, 2, "NVIDIA A10 datasheet"),
    (89, 100, 0, 48, 24, {"16-bit": 1024, "tf32": 512, "8-bit": 2048}, 128, 2, "NVIDIA L40S datasheet"),
    (90, 228, 0, 64, 32, {"16-bit": 4096, "tf32": 2048, "8-bit": 8192}, 128, 64, "NVIDIA H100 datasheet"),
    (100, 228, 512, 64, 32, {"16-bit": 8192, "tf32": 4096, "8-bit": 16384}, 128, 64,
     "NVIDIA HGX B200 datasheet; the FlashAttention-4 paper has the same 8192 and 16"),
    (120, 100, 0, 48, 24, {"16-bit": 512, "tf32": 256, "8-bit": 1024}, 128, 2, "NVIDIA RTX Blackwell whitepaper"),
)  # fmt: skip

TARGETS: dict[str, Target] = {
    f"sm_{capability}": Target(
        name=f"sm_{capability}",
        backend="cuda",
        arch=capability,
        warp_size=32,
        registers=65536,
        register_step=8,
        shared=shared * 1024,
        shared_reserved=1024,
        tensor_memory=tensor_memory,
        max_warps=warps,
        max_blocks=blocks,
        rates=Rates(
            tensor=tensor,
            special=16,
            float32=float32,
            float64=float64,
            issue=4,
            source=f"CUDA C++ Programming Guide (arithmetic throughput); tensor cores: {source}",
        ),
    )
    for capability, shared, tensor_memory, warps, blocks, tensor, float32, float64, source in _NVIDIA
}
TARGETS["gfx942"] = Target(
    name="gfx942",
    backend="hip",
    arch="gfx942",
    warp_size=64,
    registers=4 * 512 * 64,
    register_step=8,
    shared=64 * 1024,
    shared_reserved=0,
    tensor_memory=0,
    max_warps=32,
    max_blocks=16,  # a block of more than one warp takes one of 16 barriers
    rates=Rates(
        tensor={"16-bit": 2048, "tf32": 1024, "8-bit": 4096},
        special=16,
        float32=None,
        float64=None,
        issue=None,
        source="AMD Instinct MI300X datasheet (matrix cores); LLVM SISchedule.td (special functions run at a quarter "
        "of the 64 lanes); limits: LLVM AMDGPU back end",
    ),
)

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "sm_80", 108, 1.410e9, 2.039e12, "NVIDIA A100 80GB SXM datasheet: 312 TFLOP/s dense bf16"),
        Gpu("A10", "sm_86", 72, 1.695e9, 6.0e11, "NVIDIA A10 datasheet: 125 TFLOP/s dense bf16"),
        Gpu("L40S", "sm_89", 142, 2.490e9, 8.64e11, "NVIDIA L40S datasheet: 362 TFLOP/s dense bf16"),
        Gpu("H100", "sm_90", 132, 1.830e9, 3.35e12, "NVIDIA H100 SXM datasheet: 989 TFLOP/s dense bf16"),
        Gpu("H200", "sm_90", 132, 1.830e9, 4.8e12, "NVIDIA H200 SXM datasheet: 989 TFLOP/s dense bf16"),
        Gpu("B200", "sm_100", 148, 1.856e9, 7.7e12, "NVIDIA HGX B200 datasheet: 2250 TFLOP/s dense bf16"),
        Gpu("RTX 5090", "sm_120", 170, 2.407e9, 1.792e12, "NVIDIA RTX Blackwell whitepaper: 209.5 TFLOP/s dense bf16"),
        Gpu("MI300X", "gfx942", 304, 2.100e9, 5.3e12, "AMD Instinct MI300X datasheet: 1307 TFLOP/s dense bf16"),
    )
}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def gpu_named(name: str, target: Target) -> Gpu:
    """The GPU of that name, which must be one of `target`'s.

    Raises:
        ValueError: an unknown name, or a GPU of another architecture.
    """
    fitting = [gpu.name for gpu in GPUS.values() if gpu.target == target.name]
    if name not in fitting:
        raise ValueError(f"gpu: expected a GPU of {target.name} ({', '.join(fitting)}), got {name!r}")
    return GPUS[name]
