"""Compiled FlexAttention programs: what a call is compiled for, how many programs that makes, how they are kept."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from swat_flex import modifiers
from swat_flex.backends.flex.blocks import BLOCK, BlockLists, Bounds
from swat_flex.backends.flex.config import FlexConfig

PROGRAMS = 256  # programs kept at a time; the one unused for longest goes first


class Inputs(NamedTuple):
    """A call's tensors as a program takes them: q `[B, Hq, rows·block, D]`, k and v `[B, Hkv, columns·block, ·]`,
    slopes and logit_bias as in `modifiers.biased_score`, document_ids int `[B, ·]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None
    logit_bias: Tensor | None
    document_ids: Tensor | None


class Settings(NamedTuple):
    """What a program is compiled for beside its inputs; on a CPU `config` is None and the last key is the extra key."""

    scale: float
    softmax: bool
    config: FlexConfig | None


def attend(inputs: Inputs, bounds: Bounds, blocks: BlockLists, settings: Settings) -> Tensor:
    """Compute SWAT of padded tensors through FlexAttention; rows that hold no query come out as anything finite."""
    q, k, v, slopes, logit_bias, document_ids = inputs
    scale, softmax, config = settings
    left, right, offset, kv_len = bounds
    band = modifiers.band_mask(left, right, offset)
    documents = None if document_ids is None else modifiers.document_mask(document_ids, offset)

    def visible_keys(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = band(b, h, q_idx, kv_idx) & (kv_idx < kv_len)
        return visible if documents is None else visible & documents(b, h, q_idx, kv_idx)

    score = modifiers.biased_score if softmax else modifiers.log_sigmoid_score
    score_mod, mask_mod = score(slopes, logit_bias, offset), cast(modifiers.MaskMod, visible_keys)
    if config is None and not softmax:
        score_mod, mask_mod = modifiers.beside_extra_key(score_mod, mask_mod, k.shape[2] - 1)
    block = BLOCK if config is None else config.mask_block
    block_mask = BlockMask((q.shape[2], k.shape[2]), *blocks, BLOCK_SIZE=(block, block), mask_mod=mask_mod)
    run = functools.partial(flex_attention, q, k, v, score_mod, block_mask, scale, q.shape[1] != k.shape[1])
    if config is None:
        out = run()
        return out if softmax else modifiers.sum_beside_extra_key(out)
    if softmax:
        return run(kernel_options=config.options())
    out, aux = run(kernel_options=config.options(), return_aux=AuxRequest(lse=True))
    return modifiers.sigmoid_sum(out, aux.lse)


def run_compiled(inputs: Inputs, bounds: Bounds, blocks: BlockLists, settings: Settings) -> Tensor:
    """Run `attend` as a compiled program, compiling it for inputs of a kind not met before (5 to 20 s).

    A program serves every batch of more than one: a training set's last, smaller batch compiles nothing.
    """
    inputs = Inputs(*(x if x is None else _canonical(x) for x in inputs))  # type: ignore[arg-type]  # a generator of six
    q, k, v, slopes, logit_bias, document_ids = inputs
    vectors = (x if x is None else _kind(x) for x in (slopes, logit_bias))
    batched = (x if x is None else _kind_of_any_batch(x) for x in (q, k, v, document_ids, *blocks))
    return compiled(*vectors, *batched, *settings)(inputs, bounds, blocks, settings)


def with_free_batch(inputs: Inputs, blocks: BlockLists) -> tuple[Inputs, BlockLists]:
    """Return both with batches of more than one marked as free."""
    ids = inputs.document_ids
    q, k, v, ids = _free(inputs.q), _free(inputs.k), _free(inputs.v), None if ids is None else _free(ids)
    lists = BlockLists(*(x if x is None else _free(x) for x in blocks))  # type: ignore[arg-type]  # as they were
    return inputs._replace(q=q, k=k, v=v, document_ids=ids), lists


def _free(x: Tensor) -> Tensor:
    """Return a view whose first axis is marked as free: a mark on the tensor itself would reach the caller's own
    compilations. torch has no public name for it, and no other way to say it of one axis."""
    if x.shape[0] == 1:
        return x
    view = x.view_as(x)
    torch._dynamo.mark_dynamic(view, 0)
    return view


def _canonical(x: Tensor) -> Tensor:
    """Return x with the strides of a contiguous tensor, or of one whose heads and tokens are exchanged; else a copy."""
    if x.stride() == _strides(x.shape):
        return x
    if x.dim() == 4 and x.transpose(1, 2).stride() == _strides(x.transpose(1, 2).shape):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[i + 1 :].numel() for i in range(len(shape)))


def _kind(x: Tensor) -> tuple[object, ...]:
    """Return what torch.compile binds a program to, of one input."""
    return x.shape, *_kind_of_any_batch(x)


def _kind_of_any_batch(x: Tensor) -> tuple[object, ...]:
    """Return the same for all sizes of the first axis but 1, which torch.compile takes for broadcast."""
    shape = x.shape[0] == 1, *x.shape[1:]
    return type(x), shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_inference()


def compiled(*key: object) -> Callable[..., Tensor]:
    """Return `attend` compiled for one key, which must hold all that a compilation depends on.

    torch.compile gives up on a function, or falls back to a dense L × L product, after 8 compilations of one code
    object; so each key has a code object of its own, compiled once, and once more where an operator in a caller's
    compiled graph runs it (torch dispatches differently there).
    """
    state = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return _compiled(key, state)


@functools.lru_cache(maxsize=PROGRAMS)
def _compiled(key: tuple[object, ...], state: tuple[object, ...]) -> Callable[..., Tensor]:
    own = types.FunctionType(attend.__code__.replace(), attend.__globals__, "attend", attend.__defaults__)
    program: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False)
    met = False

    def run(inputs: Inputs, bounds: Bounds, blocks: BlockLists, settings: Settings) -> Tensor:
        nonlocal met
        if met and inputs.q.device.type != "cpu":  # on a CPU a caller's graph may still have it compiled once more
            return program(inputs, bounds, blocks, settings)
        marked = with_free_batch(inputs, blocks)
        with contextlib.nullcontext() if met else _told(inputs.q):
            out = program(marked[0], bounds, marked[1], settings)
        met = True
        return out

    return run


@contextlib.contextmanager
def _told(q: Tensor) -> Iterator[None]:
    """Say on a terminal what a first call waits for; elsewhere say nothing."""
    if not sys.stderr.isatty():
        yield
        return
    _, heads, length, width = q.shape
    what = f"up to {length:,} tokens, {heads} heads of {width}, {str(q.dtype).removeprefix('torch.')}"
    print(f"swat_flex: compiling FlexAttention for {what} …", end="", file=sys.stderr, flush=True)
    begin = time.monotonic()
    try:
        yield
    finally:
        print(f" {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
