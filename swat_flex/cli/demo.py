"""`swat-flex demo`: real text through SWAT, checked, then timed beside its definition and PyTorch's attention."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

import swat_flex
from swat_flex import plot
from swat_flex.api import explain, flex_swat
from swat_flex.cli import check, machine, options, report, screen
from swat_flex.cli.measure import Attention, measure
from swat_flex.cli.text import Inputs, embed, standard_library
from swat_flex.problem import WindowLike
from swat_flex.reference import naive_swat

MATRICES = 4  # [H, L, L] matrices that naive holds at once, forward and backward
CHECK_BYTES = 2**29  # what they may take in the check, in float64


def demo(
    lengths: Annotated[str, typer.Option(help="Sequence lengths in tokens.")] = "1024,2048,4096",
    window: Annotated[str, typer.Option(help="Keys per query, or left,right, or none.")] = "512",
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Channels of a head, even, at most 256.")] = 64,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(options.DTYPES)}.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    rounds: Annotated[int, typer.Option(help="Samples behind each median.")] = 3,
    png: Annotated[Path | None, typer.Option(help="Draw the times into this file.")] = None,
) -> None:
    """Run SWAT on real text: check it against its definition, then time it."""
    sizes, keys, place = options.lengths(lengths), options.window(window), options.device(device)
    options.whole("--heads", heads, 1, 1024)
    options.whole("--rounds", rounds, 1, 1000)
    png = options.picture(png)
    text = standard_library(sizes[-1])
    inputs = embed(text, heads, options.head_dim(head_dim), options.dtype(dtype, place), place)

    console = screen.console()
    setting = f"{dtype}, window {window}, {heads} heads of {head_dim}"
    backend = explain(inputs.q, inputs.k, inputs.v, keys).backend
    console.print(f"swat_flex {swat_flex.__version__}, torch {torch.__version__}, backend {backend}")
    console.print(f"{place}: {machine.describe(place)}")
    console.print(f"{setting}; text: {len(text):,} bytes of the standard library")
    console.print(f"{_checked(inputs, keys)}\n")
    console.print("naive: SWAT's definition, dense. SDPA: PyTorch's, causal softmax over all keys.")
    results = _measure(inputs, sizes, keys, rounds)
    console.print(report.table(results, inputs.q, keys))
    console.print(f"{report.notes(results, rounds)}\n")
    if png is not None:
        series = report.series(results)
        plot.save(plot.times(sizes, series, f"Forward + backward, {setting}\n{machine.describe(place)}"), png)
        console.print(f"Drawn into {png}")
    console.print(report.conclusion(results))


def _checked(inputs: Inputs, window: WindowLike) -> str:
    """Return what the check found; end the program where the result is wrong."""
    heads, longest = inputs.q.shape[1], inputs.q.shape[2]
    length = min(longest, math.isqrt(CHECK_BYTES // (MATRICES * heads * torch.float64.itemsize)))
    errors = check.compare(inputs.prefix(length), window)
    found = (
        f"against the definition in float64 at {length:,} tokens: output off by {errors.output:.1e}, "
        f"gradients by {errors.gradients:.1e} of the largest entry; allowed {errors.allowed:.1e}"
    )
    if not errors.right:
        typer.echo(f"error: wrong result, nothing was timed; {found}", err=True)
        raise typer.Exit(1)
    return f"Right {found}"


def _measure(inputs: Inputs, lengths: list[int], window: WindowLike, rounds: int) -> report.Results:
    """Every contender at every length, with a progress bar on standard error."""
    functions = {length: _functions(inputs.q, length, window) for length in lengths}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = {}
    with screen.bar(*columns) as progress:
        task = progress.add_task("", total=2 * sum(map(len, functions.values())) * (rounds + 1))
        for length in lengths:
            progress.update(task, description=f"{length:,} tokens")
            results[length] = measure(functions[length], inputs.prefix(length), rounds, lambda: progress.advance(task))
    return results


def _functions(q: Tensor, length: int, window: WindowLike) -> dict[str, Attention]:
    """The contenders; naive only where its matrices fit into a quarter of the device's memory."""
    functions: dict[str, Attention] = {
        "SWAT": lambda q, k, v: flex_swat(q, k, v, window),
        "naive": lambda q, k, v: naive_swat(q, k, v, window),
        "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if MATRICES * q.shape[1] * length * length * q.itemsize > machine.memory(q.device) // 4:
        del functions["naive"]
    return functions
