"""`python -m autotune`: look at, share and clear what was measured."""

import warnings
from collections.abc import Mapping
from datetime import UTC
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table
except ModuleNotFoundError as missing:  # only this command needs them
    raise SystemExit(f"error: python -m autotune needs {missing.name}: pip install rich typer") from None

from autotune.entry import Entry
from autotune.store import Store, open_store

KEY_DIGITS = 8  # of a key in the list; ten thousand keys then almost surely differ

app = typer.Typer(
    help="Look at, share and clear what autotune measured on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _prepare(
    context: typer.Context,
    name: Annotated[str, typer.Option("--app", help="Whose cache folder, unless AUTOTUNE_DIR names one.")] = "autotune",
) -> None:
    context.obj = open_store(name)
    context.with_resource(warnings.catch_warnings())
    warnings.simplefilter("always")
    warnings.showwarning = _show_warning


@app.command("list")
def list_entries(context: typer.Context) -> None:
    """List all entries."""
    store, entries = _measured(context)
    names = [Column(name, overflow="fold") for name in ("key", "tunable", "problem", "device")]
    numbers = [Column(name, justify="right") for name in ("ms", "speed-up")]
    table = Table(*names, *numbers, box=None, pad_edge=False, header_style="bold")
    for entry in entries:
        table.add_row(
            entry.key.digest[:KEY_DIGITS],
            escape(entry.key.tunable),
            _text(entry.key.bucket),
            escape(entry.key.device.name),
            f"{entry.winner_ms:.4f}",
            _speedup(entry),
        )
    _out().print(table)
    _out().print(f"\n{len(entries)} in {escape(store.place)}; `show KEY` tells all of one.", soft_wrap=True)


@app.command()
def show(context: typer.Context, key: Annotated[str, typer.Argument(help="Key, or enough of its beginning.")]) -> None:
    """Show one entry with every configuration tried."""
    _, entries = _measured(context)
    matches = [entry for entry in entries if entry.key.digest.startswith(key)]
    if len(matches) != 1:
        found = "no entry" if not matches else f"{len(matches)} entries"
        _fail(f"KEY: expected the beginning of one key, got {key!r}, the beginning of {found}; see `list`")
    for part in (_facts(matches[0]), "", _candidates(matches[0])):
        _out().print(part)


@app.command("export")
def export_entries(context: typer.Context, file: Annotated[Path, typer.Argument(help="JSON file to write.")]) -> None:
    """Write all entries to one file, for other machines or as a library's presets."""
    store, _ = _measured(context)
    try:
        _out().print(f"Exported {store.export_file(file)} entries to {escape(str(file))}.", soft_wrap=True)
    except OSError as error:
        _fail(f"{file} cannot be written: {error.strerror}. Name a file in a folder that you may write.")


@app.command("import")
def import_entries(
    context: typer.Context, file: Annotated[Path, typer.Argument(help="JSON file that `export` wrote.")]
) -> None:
    """Merge the entries of a file; of two for one key the faster stays, or the newer if two clocks timed them."""
    store: Store = context.obj
    try:
        merged = store.import_file(file)
    except OSError as error:
        _fail(f"{file} cannot be read: {error.strerror}. Name a file that `python -m autotune export FILE` wrote.")
    except ValueError as error:
        _fail(f"{error}. Write it with `python -m autotune export FILE`, by the same version.")
    if merged.unsaved:
        _fail(f"{merged.unsaved} entries could not be saved. Make room in {store.place}, or set AUTOTUNE_DIR.")
    _out().print(f"Imported: {merged.added} added, {merged.replaced} replaced, {merged.kept} kept as they were.")


@app.command()
def clear(context: typer.Context, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Delete all entries."""
    store, entries = _measured(context)
    if not yes:
        typer.confirm(f"Delete {len(entries)} entries in {store.place}?", abort=True)
    try:
        _out().print(f"Deleted {store.clear()} entries.")
    except OSError as error:
        _fail(f"{store.place} cannot be cleared: {error.strerror}. Delete the folder as its owner.")


def _measured(context: typer.Context) -> tuple[Store, list[Entry]]:
    """The store and all its entries; without any says so and ends the command."""
    store: Store = context.obj
    entries = list(store.entries())
    if not entries:
        _out().print(
            f"Nothing was measured yet: {escape(store.place)} holds no entry. Tune something, or "
            "`python -m autotune import FILE` what another machine exported.",
            soft_wrap=True,
        )
        raise typer.Exit
    return store, entries


def _facts(entry: Entry) -> Table:
    key = entry.key
    table = Table(Column(style="bold"), "", box=None, show_header=False, pad_edge=False)
    facts = {
        "key": key.digest,
        "tunable": f"{key.tunable}, schema {key.schema}, source {key.source}",
        "problem": _text(key.bucket),
        "device": f"{key.device.name} ({key.device.kind} {key.device.capability}, {key.device.units} units)",
        "versions": f"torch {key.versions.torch}, triton {key.versions.triton or 'absent'}",
        "measured": f"{entry.created.astimezone(UTC):%Y-%m-%d %H:%M} UTC by {entry.clock}"
        + ", interrupted" * entry.interrupted,
        "winner": f"{_text(entry.winner)}: {entry.winner_ms:.4f} ms, {_speedup(entry)} the default's speed",
    }
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    return table


def _candidates(entry: Entry) -> Table:
    """Every configuration tried: the timed ones, the fastest first, then the failures."""
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("ms", "over winner", "spread", "rounds")]
    table = Table(*entry.default, *numbers, "", box=None, pad_edge=False, header_style="bold")

    def values(config: Mapping[str, object]) -> list[str]:
        return [escape(str(config[name])) for name in entry.default]

    for config, timing in sorted(entry.timings, key=lambda timed: timed[1].median_ms):
        marks = [name for name in ("winner", "default") if config == getattr(entry, name)]
        table.add_row(
            *values(config),
            f"{timing.median_ms:.4f}",
            f"{timing.median_ms / entry.winner_ms - 1:+.1%}",
            f"{timing.spread:.1%}",
            str(timing.rounds),
            ", ".join(marks),
        )
    for config, failure in entry.failures:
        reason = " ".join(failure.reason.split())
        table.add_row(*values(config), "", "", "", "", escape(f"{failure.kind}: {reason}"))
    return table


def _text(pairs: Mapping[str, object]) -> str:
    return escape(" ".join(f"{name}={value}" for name, value in pairs.items()))


def _speedup(entry: Entry) -> str:
    return "?" if entry.speedup is None else f"{entry.speedup:.2f}x"


def _out() -> Console:
    return Console(highlight=False)


def _fail(text: str) -> NoReturn:
    Console(stderr=True, highlight=False).print(f"[red]error:[/] {escape(text)}", soft_wrap=True)
    raise typer.Exit(1)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    Console(stderr=True, highlight=False).print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="python -m autotune")
