"""A run on one page: tables and plots in a single HTML file, and the same tables in the terminal.

The page carries its images and scripts inside it and asks nothing of any server, so it can be mailed, archived and
opened anywhere, on a phone too. It is light or dark as the reader's system is.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from dynalora.common.files import write_file
from dynalora.drawing.style import for_pages, rendered
from dynalora.lab.explorer import Explorer, packed, plot_library

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawn

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table with one name column and any number of others.

    Attributes:
        columns: The headings.
        rows: One sequence of cells per row, as long as `columns`. Text is shown as it is; whole numbers get
            thousands separators, other numbers four significant digits, None a dash.
        title: Heading above it.
        note: One line below it: how to read it, what the intervals mean.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"A row of the table '{self.title}' has {len(row)} cells for {len(self.columns)} columns."
                )

    @property
    def text(self) -> list[list[str]]:
        """The cells as they are shown."""
        return [[show(cell) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it holds numbers, which are then set flush right."""
        shown = self.text
        return [
            bool(shown) and all(_NUMBER.match(row[index]) is not None for row in shown)
            for index in range(len(self.columns))
        ]


# A number with an optional unit, interval or parenthesis behind it; or a dash for none.
_NUMBER = re.compile(r"^\s*([+\-−±×]?\d|–\s*$|$)")


@dataclass(frozen=True)
class Figure:
    """A drawn figure with its caption.

    Attributes:
        drawn: A matplotlib figure, as the functions of [`drawing`][dynalora.drawing] return it.
        caption: What it shows; also read out where the picture cannot be seen.
    """

    drawn: Drawn
    caption: str

    @cached_property
    def png(self) -> bytes:
        """The bytes of a PNG file."""
        return rendered(self.drawn)

    @cached_property
    def svg(self) -> bytes:
        """The bytes of an SVG file."""
        return rendered(self.drawn, "svg")

    @property
    def width(self) -> float:
        """Its width on a page, in units of the text's size, so that what is written in it can be read."""
        return round(6 * float(self.drawn.get_figwidth()), 2)

    @property
    def data_uri(self) -> str:
        """The picture as text that goes into the page itself, light or dark as the page is."""
        return "data:image/svg+xml;base64," + base64.b64encode(for_pages(self.svg)).decode("ascii")


@dataclass(frozen=True)
class Section:
    """A part of the report: heading, a paragraph, tables, figures, and text to be shown as it is.

    Attributes:
        heading: Its title.
        text: One paragraph.
        tables: Shown after the text.
        figures: Shown after the tables.
        explorer: A plot that can be read off and zoomed, shown before the figures where plotly is installed.
        listing: Preformatted text, such as a configuration, folded away until opened.
    """

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    explorer: Explorer | None = None
    listing: str = ""


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: What was done.
        summary: The result in a sentence or two.
        sections: The rest, in order.
    """

    title: str
    summary: str
    sections: Sequence[Section]


def show(cell: Cell) -> str:
    """A cell as text: thousands separators for whole numbers, four significant digits for others, a dash for None."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return cell


def render_html(report: Report) -> str:
    """The report as one HTML page that refers to nothing outside itself. All text is escaped.

    Its scripts sort tables and draw explorers. The page's policy names them by their hashes, so no other script runs.
    What explorers are drawn with, plotly's whole library, is packed, which takes less than half of the space.
    """
    library = plot_library() if any(section.explorer for section in report.sections) else None
    scripts = [_part("report.js"), *([_part("explorer.js")] if library else [])]
    # Autoescape by name, not by file ending: data set texts and user settings end up in this page.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_part("report.html.j2")).render(
        report=report, library=packed(library) if library else None, scripts=[Markup(script) for script in scripts],
        hashes=[Markup(f"'sha256-{_hash(script)}'") for script in (*scripts, *([library] if library else []))],
    )  # fmt: skip


def _part(name: str) -> str:
    return resources.files("dynalora.lab").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def listing(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, for a report."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def write_report(report: Report, path: str | PathLike[str]) -> Path:
    """Write the report as an HTML file, whole or not at all, and return its path."""
    return write_file(path, render_html(report))


def save_figures(
    write: Callable[[str, bytes], object], drawn: Mapping[str, tuple[Drawn | None, str]], *, svg: bool = True
) -> list[Figure]:
    """Write figures as `plots/NAME.png`, and `.svg` if asked for, and return those that are there, for a report.

    `drawn` has name → figure and caption, with None in place of a figure where there is nothing to draw.
    """
    figures = []
    for name, (picture, caption) in drawn.items():
        if picture is not None:
            figures.append(Figure(picture, caption))
            write(f"plots/{name}.png", figures[-1].png)
            if svg:
                write(f"plots/{name}.svg", figures[-1].svg)
    return figures


def markdown_table(table: Table) -> str:
    """The table in Markdown, numbers flush right."""
    heads = [_markdown(column) for column in table.columns]
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    rows = [[_markdown(cell) for cell in row] for row in table.text]
    lines = ["| " + " | ".join(line) + " |" for line in (heads, rule, *rows)]
    head = [f"**{_markdown(table.title)}**", ""] if table.title else []
    return "\n".join([*head, *lines, *(["", _markdown(table.note)] if table.note else [])]) + "\n"


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$",
    "–": "--", "≤": r"$\le$", "‖": r"$\Vert$", "τ": r"$\tau$", "→": r"$\to$", "…": r"\ldots{}",
}  # fmt: skip


def latex_table(table: Table) -> str:
    """The table for LaTeX, in the style of booktabs (which the document must load)."""

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(sign, sign) for sign in text)

    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    lines = [r"\begin{tabular}{" + columns + "}", r"\toprule"]
    lines += [" & ".join(map(escaped, table.columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in table.text]
    lines += [r"\bottomrule", r"\end{tabular}"]
    comments = [f"% {line}" for line in (table.title, table.note) if line]
    return "\n".join([*comments, *lines]) + "\n"


_WHOLE_NAME = 20
"""Characters of names in a table's first column, and of words, that a narrow terminal shows unbroken."""
_GAP = 2
"""Characters between the columns of a table, and around it."""


def say(console: Console | None, *parts: str | Table) -> None:
    """Show text, as it is and unwrapped, and tables; nothing without a console."""
    for part in parts:
        if console is None:
            return
        if isinstance(part, Table):
            console.print(rich_table(part))
        else:
            console.print(part, highlight=False, markup=False, soft_wrap=True)


def rich_table(table: Table) -> RenderableType:
    """The table for a terminal, numbers flush right; in several below each other where that is too narrow for one."""
    return _Fitted(table)


@dataclass(frozen=True)
class _Fitted:
    """A table that looks at the width it is shown in: no number and no heading's word is broken."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Title and note are no wider than the screen, and no narrower because the table is.
        if self.table.title:
            yield Text(self.table.title, style="bold")
        for part in _parts(self.table, options.max_width):
            yield _rich(part, options.max_width)
        if self.table.note:
            yield Text(self.table.note, style="table.caption")


def _parts(table: Table, width: int) -> list[Table]:
    """The table, or tables of some of its columns each, all with the first, that fit into a width."""
    first, *others = (_least_width(table, column) for column in range(len(table.columns)))
    groups: list[list[int]] = [[0]]
    taken = first
    for column, least in enumerate(others, start=1):
        if taken + _GAP + least > width - _GAP and len(groups[-1]) > 1:
            groups.append([0])
            taken = first
        groups[-1].append(column)
        taken += _GAP + least
    return [
        Table([table.columns[column] for column in group], [[row[column] for column in group] for row in table.rows])
        for group in groups
    ]


def _least_width(table: Table, column: int) -> int:
    """Characters that a column needs: its heading's longest word, and numbers and short names whole."""
    words = table.columns[column].split()
    cells = [row[column] for row in table.text]
    whole = table.numeric[column] or _has_names(table, column)
    words += cells if whole else [word[:_WHOLE_NAME] for cell in cells for word in cell.split()]
    return max(map(len, words), default=1)


def _has_names(table: Table, column: int) -> bool:
    """Whether a column is the first, with names of a usual length, which are told apart by their ends."""
    return column == 0 and max((len(row[0]) for row in table.text), default=0) <= _WHOLE_NAME


def _widths(table: Table, width: int) -> list[int]:
    """Characters for each column: what it needs, and of what is left a share by how much more it could take."""
    columns = range(len(table.columns))
    least = [_least_width(table, column) for column in columns]
    most = [max(map(len, [table.columns[column], *(row[column] for row in table.text)])) for column in columns]
    wanted = [max(0, full - need) for full, need in zip(most, least, strict=True)]
    left = max(0, width - sum(least) - _GAP * len(least))
    share = min(1.0, left / max(1, sum(wanted)))
    return [need + int(share * more) for need, more in zip(least, wanted, strict=True)]


def _rich(table: Table, width: int) -> RichTable:
    shown = RichTable(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column, characters in enumerate(_widths(table, width)):
        heading = escape(table.columns[column])
        shown.add_column(
            heading, justify="right" if table.numeric[column] else "left", overflow="fold", width=characters
        )
    for row in table.text:
        shown.add_row(*map(escape, row))
    return shown
