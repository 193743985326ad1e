"""Registers, spills, occupancy, instruction mix and static bound of a Triton kernel, for any target on any machine."""

from swat_flex.inspection.assembly import Instruction, parse_amdgcn, parse_sass
from swat_flex.inspection.bound import Prediction, predict
from swat_flex.inspection.execute import EXECUTABLE, Execution, compile_launch, execute
from swat_flex.inspection.kernel import Inspection, compile_for, inspect_kernel
from swat_flex.inspection.launches import Launched, emulated, launches_executed
from swat_flex.inspection.loops import Loop, inner_loops
from swat_flex.inspection.occupancy import Occupancy, Resources, occupancy
from swat_flex.inspection.own import OwnKernel, own_kernels
from swat_flex.inspection.registers import undefined_registers
from swat_flex.inspection.targets import GPUS, TARGETS, Gpu, Rates, Target, gpu_named, target_named

__all__ = [
    "EXECUTABLE",
    "GPUS",
    "TARGETS",
    "Execution",
    "Gpu",
    "Inspection",
    "Instruction",
    "Launched",
    "Loop",
    "Occupancy",
    "OwnKernel",
    "Prediction",
    "Rates",
    "Resources",
    "Target",
    "compile_for",
    "compile_launch",
    "emulated",
    "execute",
    "gpu_named",
    "inner_loops",
    "inspect_kernel",
    "launches_executed",
    "occupancy",
    "own_kernels",
    "parse_amdgcn",
    "parse_sass",
    "predict",
    "target_named",
    "undefined_registers",
]
