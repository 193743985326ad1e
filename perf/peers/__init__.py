"""Every contender behind one small interface."""

from perf.peers.ours import Naive, Swat, SwatDecode, TritonVariant
from perf.peers.packages import Cudnn, Fla, LocalAttention, TritonSigmoid
from perf.peers.peer import Peer, Run, one_line
from perf.peers.pytorch import FlashAttention2, FlashAttention2Alibi, FlexSoftmax, SdpaBand, SdpaCausal, SdpaRing

ATTENTION: tuple[Peer, ...] = (
    Swat("cpp"),
    Swat("banded"),
    Swat("flex"),
    Swat("triton"),
    Naive(),
    FlexSoftmax(),
    SdpaBand(),
    SdpaCausal(),
    FlashAttention2(),
    FlashAttention2Alibi(),
    Cudnn(),
    Fla(),
    TritonSigmoid(causal=True),
    TritonSigmoid(causal=False),
    LocalAttention(),
)
DECODING: tuple[Peer, ...] = (
    SwatDecode(),
    SwatDecode("banded"),
    Swat("banded"),
    Swat("flex"),
    Swat("triton"),
    Naive(),
    SdpaRing(),
    SdpaBand(),
)
# On a GPU `banded` and `naive` are thousands of launches, and tell nothing. What matters most goes first.
GPU_ATTENTION: tuple[Peer, ...] = (
    Swat("triton"),
    Swat("flex"),
    FlexSoftmax(),
    FlashAttention2(),
    Cudnn(),
    SdpaCausal(),
    TritonVariant("backward, 4 warps", ("query_gradient", "key_gradients"), warps=4),
    TritonVariant("backward, 8 warps", ("query_gradient", "key_gradients"), warps=8),
    TritonVariant("backward, 64×64, 4 warps", ("query_gradient", "key_gradients"), block_m=64, block_n=64, warps=4),
    TritonVariant("descriptors", ("forward", "query_gradient", "key_gradients"), descriptors=True),
    FlashAttention2Alibi(),
    Fla(),
    TritonSigmoid(causal=True),
)
GPU_DECODING: tuple[Peer, ...] = (SwatDecode(), Swat("triton"), SdpaRing())

__all__ = ["ATTENTION", "DECODING", "GPU_ATTENTION", "GPU_DECODING", "Peer", "Run", "one_line"]
