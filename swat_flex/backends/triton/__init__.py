from swat_flex.backends.triton.config import DecodeConfig, TritonConfig
from swat_flex.backends.triton.decode_op import decode as swat_decode
from swat_flex.backends.triton.op import configuration, supports, swat, tunables

__all__ = ["DecodeConfig", "TritonConfig", "configuration", "supports", "swat", "swat_decode", "tunables"]
