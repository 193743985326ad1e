"""Read a prompt in chunks and decode a stream token by token in constant memory, with rotary positions.

It checks itself: every row must be that of `naive_swat` over the whole sequence.
"""

import torch

from swat_flex import RingCache, apply_rope, naive_swat, swat_decode, swat_prefill

HEADS, KEY_HEADS, DIM, WINDOW = 4, 2, 32, 64
CHUNKS, LENGTH = (50, 70), 400  # tokens of the prompt, two chunks of it, and of the whole stream


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, LENGTH, DIM)
    k, v = torch.randn(2, 1, KEY_HEADS, LENGTH, DIM)

    cache = RingCache(batch=1, heads=KEY_HEADS, window=WINDOW, head_dim=DIM)
    parts, start = [], 0
    for tokens in CHUNKS:
        now = slice(start, start + tokens)
        positions = cache.positions(tokens)  # [1, tokens]: they go on from what the cache has seen
        turned_q, turned_k = apply_rope(q[:, :, now], positions), apply_rope(k[:, :, now], positions)
        parts.append(swat_prefill(turned_q, turned_k, v[:, :, now], cache))
        start += tokens
        print(f"after a chunk of {tokens}: {int(cache.length)} tokens seen, {cache.nbytes:,} bytes kept")

    for i in range(start, LENGTH):
        now, positions = slice(i, i + 1), cache.positions(1)
        cache.append(apply_rope(k[:, :, now], positions), v[:, :, now])
        parts.append(swat_decode(apply_rope(q[:, :, now], positions), cache))
    print(f"after {LENGTH - start} more:      {int(cache.length)} tokens seen, {cache.nbytes:,} bytes kept")

    expected = naive_swat(apply_rope(q).double(), apply_rope(k).double(), v.double(), WINDOW)
    error = (torch.cat(parts, 2).double() - expected).abs().max()
    assert error < 1e-4, error
    print(f"largest difference from the definition over the whole stream: {error:.1e}")


if __name__ == "__main__":
    main()
