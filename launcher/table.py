"""A table that fits its terminal: the least important columns are dropped first, text is wrapped."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TextIO

from rich.console import Console
from rich.table import Table

from launcher.board import DeviceResult, RankedRun, TableLine, UnrankedRun, format_cell
from launcher.ledger import single_line

PIPE_WIDTH = 1_000_000  # characters; wide enough that nothing is cut or wrapped where no terminal shows it
GAP = 2  # characters between columns
LEAST_TEXT = 24  # characters of a column of text, which is wrapped to this width before another is dropped
BEST_STYLE = "bold green"


class Layout(NamedTuple):
    """The columns of a kind of table."""

    order: tuple[str, ...]  # from left to right
    importance: tuple[
        str, ...
    ]  # the first of them stay the longest; others are shown when they are asked for
    wrapped: tuple[str, ...]  # those of text, which give way first


LAYOUTS: dict[type, Layout] = {
    RankedRun: Layout(
        order=(
            "rank",
            "val_bpb",
            "description",
            "gain",
            "stderr",
            "verified",
            "status",
            "run",
            "tokens_per_second",
            "mfu_percent",
            "memory_gb",
            "num_params_M",
            "flags",
            "seed",
            "time",
            "reason",
        ),
        importance=(
            "rank",
            "val_bpb",
            "description",
            "run",
            "gain",
            "verified",
            "status",
            "stderr",
            "tokens_per_second",
            "memory_gb",
            "mfu_percent",
            "num_params_M",
            "flags",
            "seed",
        ),
        wrapped=("description", "reason"),
    ),
    UnrankedRun: Layout(
        order=(
            "val_bpb",
            "description",
            "why",
            "run",
            "device",
            "status",
            "flags",
            "seed",
            "time",
            "reason",
        ),
        importance=("val_bpb", "description", "why", "run", "device"),
        wrapped=("description", "why", "device", "reason"),
    ),
    DeviceResult: Layout(
        order=DeviceResult._fields,
        importance=(
            "track",
            "device",
            "best_val_bpb",
            "gap_closed_percent",
            "runs",
            "baseline_val_bpb",
            "platform",
            "val_tokens",
            "tokens_M",
            "petaflops",
            "energy_kj",
        ),
        wrapped=("device",),
    ),
}


def open_console(out: TextIO) -> Console:
    """Return a console that takes text as it is. On a terminal it has the terminal's width."""
    width = None if out.isatty() else PIPE_WIDTH
    return Console(file=out, width=width, markup=False, emoji=False, highlight=False)


def print_table(
    console: Console, title: str, lines: Sequence[TableLine], columns: Sequence[str] = ()
) -> None:
    """Print a title, of a line or more, and a table of lines of one kind.

    columns: those asked for; empty: those that fit
    """
    layout = LAYOUTS[type(lines[0])]
    chosen = list(columns) or fitting_columns(lines, layout, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for name in chosen:
        is_text = isinstance(getattr(lines[0], name), str | list)
        justify: Literal["left", "right"] = "left" if is_text else "right"
        wrapped = name in layout.wrapped
        table.add_column(
            name, justify=justify, no_wrap=not wrapped, overflow="fold" if wrapped else "ellipsis"
        )
    for line in lines:
        style = BEST_STYLE if is_best(line) else None
        table.add_row(*(show(line, name) for name in chosen), style=style)
    with console.capture() as captured:
        for heading in title.split("\n"):
            console.print(single_line(heading))
        console.print(table)
    for text in captured.get().removesuffix("\n").split("\n"):
        console.file.write(text.rstrip() + "\n")


def fitting_columns(lines: Sequence[TableLine], layout: Layout, width: int) -> list[str]:
    """Return the columns that fit into `width` characters, in their order. Empty ones are left out."""
    chosen: list[str] = []
    used = -GAP
    for name in layout.importance:
        cells = [show(line, name) for line in lines]
        if chosen and all(cell == "-" for cell in cells):
            continue
        needed = max(len(name), *map(len, cells))
        if name in layout.wrapped:
            needed = min(needed, max(LEAST_TEXT, len(name)))
        if used + GAP + needed > width and len(chosen) > 1:
            break
        used += GAP + needed
        chosen.append(name)
    return [name for name in layout.order if name in chosen]


def show(line: TableLine, name: str) -> str:
    """Return a cell of a table. The best of a board is marked where there are no colours, too."""
    cell = format_cell(name, getattr(line, name)) or "-"
    return f"* {cell}" if name == "rank" and is_best(line) else cell


def is_best(line: TableLine) -> bool:
    return isinstance(line, RankedRun) and line.rank == 1
