"""Every contender behind one small interface."""

from perf.peers.ours import Naive, Swat, SwatDecode
from perf.peers.packages import Cudnn, Fla, LocalAttention, TritonSigmoid
from perf.peers.peer import Configured, Peer, Run, one_line
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
    Swat("banded"),
    Swat("flex"),
    Swat("triton"),
    Naive(),
    SdpaRing(),
    SdpaBand(),
)

__all__ = ["ATTENTION", "DECODING", "Configured", "Peer", "Run", "one_line"]
