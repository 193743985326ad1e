"""PTX executed on a CPU: what compiled kernels compute, and the rules of the hardware that they break."""

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.machine import Machine
from swat_flex.inspection.ptx.memory import Global, TensorMap
from swat_flex.inspection.ptx.parser import Instruction, Program, parse

__all__ = ["Fault", "Global", "Instruction", "Machine", "Program", "TensorMap", "parse"]
