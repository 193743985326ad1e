"""What N devices send each other when one sequence is split over them: as a formula and a table, not a measurement."""

from __future__ import annotations

from rich import box
from rich.table import Table

FORMULA = (
    "Bytes that the busiest device receives in one layer's forward, with t = B·Hkv·(D + Dv)·bytes per token of length: "
    "halo min(W − 1, (N − 1)·L/N)·t, its gradients the same way back; ring attention and all-gather "
    "(N − 1)·L/N·t, in N − 1 steps and at once. Backward again: halo 1×, ring 2× (keys and values go round with their "
    "gradients), all-gather 2× (keys and values, and the reduce-scatter of their gradients). "
    "Held for them: halo W − 1 tokens, ring 2·L/N, all-gather L. Computed, not measured."
)
EXAMPLE = {"length": 2**20, "window": 4096, "batch": 1, "kv_heads": 8, "head_dim": 128, "item": 2}
DEVICES = (2, 4, 8, 16, 32, 64)


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
    """Forward bytes of one layer of `EXAMPLE`, for several numbers of devices."""
    e = EXAMPLE
    per_token = token_bytes(e["batch"], e["kv_heads"], e["head_dim"], e["head_dim"], e["item"])
    title = (
        f"Received per device and layer, forward: L {e['length']:,}, W {e['window']:,}, {e['kv_heads']} key heads of "
        f"{e['head_dim']}, bfloat16"
    )
    page = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title=title, title_justify="left")
    for column in (
        "devices",
        "halo MiB",
        "ring MiB",
        "all-gather MiB",
        "ring / halo",
        "held: halo",
        "ring",
        "all-gather",
    ):
        page.add_column(column, justify="right")
    for devices in DEVICES:
        halo = halo_bytes(devices, e["length"], e["window"], per_token)
        ring = ring_bytes(devices, e["length"], per_token)
        held = (halo, 2 * e["length"] // devices * per_token, e["length"] * per_token)
        mib = [f"{size / 2**20:,.0f}" for size in (halo, ring, ring)]
        page.add_row(f"{devices}", *mib, f"{ring / halo:,.0f}×", *(f"{size / 2**20:,.0f}" for size in held))
    return page
