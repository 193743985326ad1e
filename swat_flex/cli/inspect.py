"""`swat-flex inspect`: a Triton kernel's machine code for any target, on a machine with or without a GPU."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table

from autotune.files import write_whole
from swat_flex.cli import executed, options, screen
from swat_flex.inspection import (
    GPUS,
    Gpu,
    Inspection,
    Loop,
    Prediction,
    gpu_named,
    inspect_kernel,
    own_kernels,
    predict,
    target_named,
)
from swat_flex.problem import WindowLike

NOTE = "The bound is a static prediction from instruction counts and published rates, not a measurement."


def inspect(
    kernel: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:KERNEL]",
            help="A triton.jit function of a module or of a .py file; with --run, a function that launches it.",
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 or gfx942.")] = "sm_90",
    signature: Annotated[
        str,
        typer.Option(help='Types of the run-time arguments in order, "*bf16,fp32,i32"; ":16" for a multiple of 16.'),
    ] = "",
    constexpr: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A compile-time argument; may be repeated.")
    ] = None,
    warps: Annotated[int, typer.Option(help="Warps per block.")] = 4,
    stages: Annotated[int, typer.Option(min=0, help="Software-pipelining stages.")] = 3,
    maxnreg: Annotated[int | None, typer.Option(help="Cap on registers per thread (NVIDIA).")] = None,
    gpu: Annotated[
        str | None, typer.Option(help='For TFLOP/s: "A100", "H100", "H200", "B200", "RTX 5090" or "MI300X".')
    ] = None,
    flops: Annotated[
        float | None, typer.Option(min=0, help="Useful FLOP of one loop iteration of one block, for TFLOP/s.")
    ] = None,
    bytes_moved: Annotated[
        float | None,
        typer.Option("--bytes", min=0, help="Bytes of GPU memory that one loop iteration of one block moves."),
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Head dimension of swat_flex's own kernels.")] = 64,
    window: Annotated[str, typer.Option(help="Window of swat_flex's own kernels: tokens, or left,right.")] = "1024",
    run: Annotated[
        bool, typer.Option("--run", help="Execute the compiled code on the CPU instead, on a small case.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the same facts to this file.")] = None,
) -> None:
    """Registers, spills, occupancy, instruction mix and static bound of a Triton kernel, for any target.

    The bound is a prediction from instruction counts and published rates, not a measurement. --run executes the
    machine's instructions one by one, and tells what they compute, write and never reach, or which rule they break.
    """
    options.whole("--head-dim", head_dim, 1, 256)
    keys = options.window(window)
    if run:
        works = executed.own(head_dim, keys) if kernel is None else [executed.of_function(kernel, _load(kernel))]
        records = executed.run(target, works)
        _write(json_file, records)
        raise typer.Exit(any(record["fault"] for record in records))
    if kernel is None:
        _write(json_file, _report_own(head_dim, keys, target, gpu))
        return
    if warps < 1 or warps & (warps - 1):
        raise options.refused("--warps", "a power of two", warps)
    triton_options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if maxnreg is not None:
        triton_options["maxnreg"] = maxnreg
    try:
        product = gpu_named(gpu, target_named(target)) if gpu else None
        types = [word.strip() for word in signature.split(",")] if signature else []
        found = inspect_kernel(_load(kernel), types, _constexprs(constexpr or []), target, **triton_options)
    except typer.BadParameter:
        raise
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(_last_line(error)) from error
    except Exception as error:  # whatever Triton or ptxas makes of a kernel that is not ours
        told = f"expected a kernel that compiles for {target}, got {type(error).__name__}: {_last_line(error)}"
        raise typer.BadParameter(told, param_hint="MODULE:KERNEL") from error
    predictions = [
        predict(loop, found.warps, found.target, gpu=product, flops=flops, bytes_moved=bytes_moved)
        for loop in found.loops
    ]
    screen.console().print(_report(found, predictions, product))
    _write(json_file, _record(found, predictions, product))


def _report_own(head_dim: int, window: WindowLike, target: str, gpu: str | None) -> list[dict[str, Any]]:
    """Print each of our kernels, bfloat16, in its default configuration; the same for a file."""
    try:
        chosen = target_named(target)
        product = gpu_named(gpu, chosen) if gpu else None
        kernels = own_kernels(head_dim, window, target)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(_last_line(error), param_hint="--target") from error
    console, records = screen.console(), []
    for own in kernels:
        found = own.found
        gpus = [each for each in GPUS.values() if each.target == chosen.name]
        # What copies is bounded by a GPU's memory: where none was named, by the fastest memory of the target.
        on = product or (max(gpus, key=lambda each: each.bandwidth) if own.bytes_moved else None)
        predictions = [
            predict(loop, found.warps, found.target, gpu=on, flops=own.flops if loop is own.interior else None,
                    bytes_moved=own.bytes_moved if loop is own.interior else None)
            for loop in found.loops
        ]  # fmt: skip
        console.print(f"[bold]{own.name}[/], {own.config}", markup=True)
        console.print(_report(found, predictions, on))
        if own.copied and on:
            step, least = 64 * 8 * own.copied, 64 * 8e6 * own.copied / on.bandwidth
            console.print(
                f"A step of 64 sequences with 8 key heads each copies {step:,} bytes of keys and values: "
                f"at least {least:.1f} µs on {on.name}."
            )
        console.print("")
        records.append(_record(found, predictions, on) | {"copied": own.copied})
    console.print(
        "Loops in order: the window's two edges, the interior without masks. TFLOP/s counts a kernel's own matrix "
        "products; only the forward's are all useful."
    )
    return records


def _load(text: str) -> Any:
    """The object that MODULE:KERNEL names; MODULE is importable from here, or a .py file."""
    module_name, _, name = text.rpartition(":")
    if not module_name or not name:
        raise options.refused("MODULE:KERNEL", "a module and a kernel, as in kernels.py:forward", text)
    try:
        if module_name.endswith(".py"):
            unique = f"inspected_{Path(module_name).stem}"  # a file may be called as a module that is loaded
            spec = importlib.util.spec_from_file_location(unique, module_name)
            if spec is None or spec.loader is None:
                raise ImportError(f"{module_name} cannot be loaded")
            module = sys.modules[unique] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")  # as `python -m` does
            module = importlib.import_module(module_name)
        return getattr(module, name)
    except Exception as error:  # the module's own code runs here
        told = f"expected a kernel that can be imported, got {text!r}: {type(error).__name__}: {_last_line(error)}"
        raise typer.BadParameter(told, param_hint="MODULE:KERNEL") from error


def _constexprs(pairs: list[str]) -> dict[str, Any]:
    """Python literals where they are, else text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise options.refused("--constexpr", "NAME=VALUE", pair)
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no message")


def _report(found: Inspection, predictions: list[Prediction], gpu: Gpu | None) -> Group:
    parts: list[Any] = [_facts(found)]
    if found.loops:
        unknown = {unit: why for prediction in predictions for unit, why in prediction.unknown.items()}
        parts += ["", _loops(found.loops, predictions)]
        parts += [f"unknown: {unit}, {why}" for unit, why in sorted(unknown.items())]
        parts += ["", NOTE, f"Rates: {escape(found.target.rates.source)}."]
        parts += [f"{gpu.name}: {escape(gpu.source)}."] if gpu else []
    return Group(*parts)


def _facts(found: Inspection) -> Table:
    table = Table(Column(style="bold"), "", box=None, show_header=False, pad_edge=False)
    held, fits = found.resources, found.occupancy
    spills = f"{held.local_loads} loads and {held.local_stores} stores, {held.stack} bytes of stack per thread"
    limits = ", ".join(f"{name} {blocks}" for name, blocks in fits.limits.items())
    facts = {
        "kernel": f"{found.name} for {found.target.name}, {found.warps} warps, {len(found.instructions)} instructions",
        "registers": f"{held.registers} per thread"
        + (f", {held.scalar_registers} scalar per warp" if held.scalar_registers is not None else ""),
        "spills": spills if found.local_memory_instructions else f"none, {held.stack} bytes of stack per thread",
        "shared": f"{held.shared} bytes per block"
        + (f", {held.tensor_memory} columns of tensor memory" if held.tensor_memory else ""),
        "occupancy": f"{fits.blocks} blocks, {fits.warps} of {found.target.max_warps} warps per multiprocessor, "
        f"limited by {' and '.join(fits.limited_by)} (blocks by {limits})",
        "float64": "used" if found.has_float64 else "none",
        "tensor cores": ", ".join(sorted({i.opcode for i in found.tensor_core_instructions})) or "not used",
        "inner loops": "" if found.loops else "none",
    }
    for name, fact in facts.items():
        if fact:
            table.add_row(name, escape(fact))
    return table


def _loops(loops: tuple[Loop, ...], predictions: list[Prediction]) -> Table:
    """One column per loop: instructions of a warp by class, then the clocks of each unit."""
    columns = [Column(f"loop at {loop.start:#x}", justify="right") for loop in loops]
    table = Table("per iteration", *columns, box=None, pad_edge=False, header_style="bold")
    counts = [loop.counts for loop in loops]
    table.add_row("instructions per warp", *(str(len(loop.instructions)) for loop in loops), style="bold")
    kinds = sorted({kind for count in counts for kind in count})
    for kind in sorted(kinds, key=lambda kind: -max(count.get(kind, 0) for count in counts)):
        table.add_row(f"  {kind}", *(str(count.get(kind, "")) for count in counts))
    table.add_row("clocks per block", style="bold")
    for unit in dict.fromkeys(unit for prediction in predictions for unit in prediction.clocks):
        table.add_row(f"  {unit}", *(_number(p.clocks.get(unit)) for p in predictions))
    table.add_row("predicted bound", *(_bound(p) for p in predictions), style="bold")
    if any(p.tflops for p in predictions):
        table.add_row("at most TFLOP/s", *(_number(p.tflops) for p in predictions), style="bold")
    return table


def _bound(prediction: Prediction) -> str:
    if prediction.bound is None:
        return "unknown"
    return f"{prediction.bound}, of the known units" if prediction.unknown else prediction.bound


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _record(found: Inspection, predictions: list[Prediction], gpu: Gpu | None) -> dict[str, Any]:
    return {
        "kernel": found.name,
        "target": found.target.name,
        "gpu": gpu.name if gpu else None,
        "warps": found.warps,
        "instructions": len(found.instructions),
        "resources": asdict(found.resources),
        "occupancy": asdict(found.occupancy) | {"limited_by": found.occupancy.limited_by},
        "has_float64": found.has_float64,
        "loops": [
            {
                "start": loop.start,
                "end": loop.end,
                "instructions": len(loop.instructions),
                "counts": loop.counts,
                "prediction": asdict(prediction) | {"bound": prediction.bound},
            }
            for loop, prediction in zip(found.loops, predictions, strict=True)
        ],
        "note": NOTE,
    }


def _write(file: Path | None, facts: object) -> None:
    if file is None:
        return
    try:
        write_whole(file, json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        told = f"expected a file that can be written, got {str(file)!r}: {error.strerror}"
        raise typer.BadParameter(told, param_hint="--json") from error
