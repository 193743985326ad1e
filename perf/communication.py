"""What N devices send each other when one sequence is split over them: as a formula and a table, not a measurement."""

from __future__ import annotations

from rich import box
from rich.table import Column, Table

FORMULA = (
    "Bytes that the busiest device receives in one layer's forward, with t = B·Hkv·(D + Dv)·bytes per token of length: "
    "halo min(W − 1, (N − 1)·L/N)·t, its gradients the same way back; ring attention and all-gather "
    "(N − 1)·L/N·t, in N − 1 steps and at once. Backward again: halo 1×, ring 2× (keys and values go round with their "
    "gradients), all-gather 2× (keys and values, and the reduce-scatter of their gradients). "
    "Held for them: halo W − 1 tokens, ring 2·L/N, all-gather L. Computed, not measured."
)
LENGTH, WINDOW, KV_HEADS, HEAD_DIM = 2**20, 4096, 8, 128  # of the table's layer, one row in bfloat16
DEVICES = (2, 4, 8, 16, 32, 64)
COLUMNS = ("devices", "halo MiB", "ring MiB", "all-gather MiB", "ring / halo", "held: halo", "ring", "all-gather")


def token_bytes(batch: int, kv_heads: int, head_dim: int, value_dim: int, item: int) -> int:
    """Keys and values of one position, bytes."""
    return batch * kv_heads * (head_dim + value_dim) * item


def halo_bytes(devices: int, length: int, window: int, per_token: int) -> int:
    """Received by the busiest device in a forward: the last window − 1 tokens before its own."""
    return min(window - 1, (devices - 1) * length // devices) * per_token


def ring_bytes(devices: int, length: int, per_token: int) -> int:
    """Received by each device in a forward of ring attention: every other device's keys and values pass by.

    An all-gather receives as much, at once.
    """
    return (devices - 1) * length // devices * per_token


def table() -> Table:
    """Forward bytes of one layer, for several numbers of devices."""
    per_token = token_bytes(1, KV_HEADS, HEAD_DIM, HEAD_DIM, 2)
    layer = f"L {LENGTH:,}, W {WINDOW:,}, {KV_HEADS} key heads of {HEAD_DIM}, bfloat16"
    columns = (Column(name, justify="right") for name in COLUMNS)
    title = f"Received per device and layer, forward: {layer}"
    page = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for devices in DEVICES:
        halo = halo_bytes(devices, LENGTH, WINDOW, per_token)
        ring = ring_bytes(devices, LENGTH, per_token)
        held = (halo, 2 * LENGTH // devices * per_token, LENGTH * per_token)
        received, kept = ([f"{size / 2**20:,.0f}" for size in sizes] for sizes in ((halo, ring, ring), held))
        page.add_row(f"{devices}", *received, f"{ring / halo:,.0f}×", *kept)
    return page
