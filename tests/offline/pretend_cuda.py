"""A pretend NVIDIA GPU: enough for torch.compile to lower to Triton on a machine without one. Nothing runs on it.

Import before torch: `at::getCUDAHooks` is read once, while torch loads. Private API throughout; made for the version of
torch that constraints.txt pins.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

# Autograd on tensors of a device asks for its guard and its hooks, which a CPU build leaves out; those of a CUDA build
# need a driver. The hooks take their place by priority, the guard by coming last.
STUBS = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static const Device gpu(DeviceType::CUDA, 0);
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return gpu; }
  Device getDevice() const override { return gpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
extern "C" void register_guard() { static impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard); }
namespace at { struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
using Registration = Registerer<std::string, std::unique_ptr<CUDAHooksInterface>, CUDAHooksArgs>;
static Registration hooks("CUDAHooks", REGISTRY_PREFERRED, CUDAHooksRegistry(),
                          Registration::DefaultCreator<CUDAHooks>, ""); }
"""

# Name, multiprocessors, shared memory per block (bytes) of one GPU per compute capability.
GPUS = {80: ("NVIDIA A100", 108, 166912), 90: ("NVIDIA H100", 132, 232448)}


def load_stubs(scratch: Path) -> None:
    """Build the stubs once per version of torch, load them, then torch."""
    if "torch" in sys.modules:
        raise RuntimeError("the pretend GPU must be loaded before torch")
    spec = importlib.util.find_spec("torch")
    root = Path(spec.submodule_search_locations[0])
    library = scratch / f"pretend_cuda_{importlib.metadata.version('torch')}.so"
    if not library.exists():
        source = library.with_suffix(".cpp")
        source.write_text(STUBS)
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root}/include"]
        subprocess.check_call(["g++", *flags, str(source), "-o", str(library), f"-L{root}/lib", "-lc10", "-ltorch_cpu"])
    ctypes.CDLL(f"{root}/lib/libtorch_cpu.so", mode=ctypes.RTLD_GLOBAL)
    stubs = ctypes.CDLL(str(library))
    import torch  # noqa: F401  # a CUDA build registers its guard here

    stubs.register_guard()


def install(capability: int) -> None:
    """Answer what torch.compile asks of a GPU with the properties of one of `GPUS`."""
    import torch
    import torch._inductor.compile_fx

    name, multiprocessors, shared = GPUS[capability]
    properties = types.SimpleNamespace(
        name=name,
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=multiprocessors,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        gcnArchName="",
        is_integrated=False,
        uuid="0",
    )
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "set_device": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "current_stream": lambda device=None: types.SimpleNamespace(cuda_stream=0),
        "memory_allocated": lambda device=None: 0,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "is_current_stream_capturing": lambda: False,
    }
    for attribute, answer in answers.items():
        setattr(torch.cuda, attribute, answer)
    for attribute in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
        if not hasattr(torch._C, attribute):
            setattr(torch._C, attribute, lambda *_: 0)
    torch.version.cuda = torch.version.cuda or "12.8"
    _answer_dynamo(torch)
    _answer_triton(torch, capability)
    _keep_inductor_off_the_device(torch)


def _answer_dynamo(torch: types.ModuleType) -> None:
    from torch._dynamo.device_interface import CudaInterface

    for attribute in (
        "current_device",
        "set_device",
        "device_count",
        "current_stream",
        "synchronize",
        "get_device_properties",
        "memory_allocated",
        "is_bf16_supported",
    ):
        setattr(CudaInterface, attribute, staticmethod(getattr(torch.cuda, attribute)))
    CudaInterface.exchange_device = staticmethod(lambda device: 0)
    CudaInterface.maybe_exchange_device = staticmethod(lambda device: 0)
    CudaInterface.get_raw_stream = staticmethod(lambda device: 0)


def _answer_triton(torch: types.ModuleType, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver(triton.backends.nvidia.driver.CudaDriver):
        def __init__(self) -> None:
            pass

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> object:
            return torch.device("cuda", 0)

        @staticmethod
        def is_active() -> bool:
            return True

    triton.runtime.driver.set_active(Driver())


def _keep_inductor_off_the_device(torch: types.ModuleType) -> None:
    """Its pattern matchers trace examples on real device tensors, its constant folding makes small ones."""
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm

    for module, attribute in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init")):
        setattr(module, attribute, lambda *_, **__: None)
    misc_patterns._misc_patterns_init = lambda *_, **__: None
    library = _keep_inductor_off_the_device.library = torch.library.Library("aten", "IMPL", "CUDA")
    for operator in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):

        def on_cpu(*args, operator=operator, **kwargs):
            return operator(*args, **{**kwargs, "device": "cpu", "pin_memory": None})

        library.impl(operator._schema.name + (f".{n}" if (n := operator._schema.overload_name) else ""), on_cpu)
