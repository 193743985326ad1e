from swat_flex.decode.attend import swat_decode, swat_prefill
from swat_flex.decode.ring import RingCache

__all__ = ["RingCache", "swat_decode", "swat_prefill"]
