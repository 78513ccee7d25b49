from __future__ import annotations

import base64
import gzip
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import pkgutil
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure as MplFigure
from rich.console import Console

from dynalora import drawing
from dynalora.adapter.method import Panel
from dynalora.common.statistics import Interval
from dynalora.drawing.comparison import differing, plot_bars, plot_transfer
from dynalora.drawing.landscape import plot_rank_heatmap
from dynalora.drawing.style import PALETTE, figure, for_pages, heat_map, log_scale, look, looks, panels, rendered, save
from dynalora.drawing.training import plot_losses, plot_metrics
from dynalora.errors import ConfigError
from dynalora.lab.baselines import BASELINES
from dynalora.lab.explorer import Explorer, Line, Point
from dynalora.lab.report import Figure, Report, Section, Table, render_html, rich_table, show, write_report
from dynalora.lab.scores import decimals_for
from dynalora.methods import METHODS

EVIL = "<script>alert('x')</script>"


class Links(HTMLParser):
    """Everything a browser would fetch, and all visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "data", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(report: Report) -> Links:
    links = Links()
    links.feed(render_html(report))
    return links


@pytest.fixture
def report() -> Report:
    table = Table(
        ["method", "loss", "parameters", "note"], [["disel", "0.5100", 1234567, EVIL], ["lora", "0.61", None, "b"]]
    )
    picture = Figure(plot_bars({"": {"a": Interval(1, 1, 1)}}, label="y"), caption=EVIL)
    return Report(EVIL, EVIL, [Section(EVIL, text=EVIL, tables=[table], figures=[picture], listing=EVIL)])


def test_text_is_escaped_everywhere(report: Report) -> None:
    page = parsed(report)
    assert page.tags.count("script") == 1  # the page's own
    assert page.text.count(EVIL) >= 6


def test_page_asks_nothing_of_any_server(report: Report) -> None:
    page = parsed(report)
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    html = render_html(report)
    assert "http" not in html.replace("http-equiv", "")
    assert "@import" not in html
    assert "url(" not in html


def policy(html: str) -> str:
    return re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]  # type: ignore[index]


def test_no_script_runs_but_those_that_the_page_names(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'window.Plotly = "</script>";'
    library = SimpleNamespace(get_plotlyjs=lambda: source)
    monkeypatch.setitem(sys.modules, "plotly", SimpleNamespace(offline=library))
    monkeypatch.setitem(sys.modules, "plotly.offline", library)
    explorer = Explorer([Line("lora", [Point({"a": 1.0, "b": 2.0}, EVIL)])], {"a": EVIL, "b": "B"}, "a", "b")
    html = render_html(replace(report, sections=[replace(report.sections[0], explorer=explorer)]))
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 2
    (packed,) = re.findall(r'<script type="application/gzip" id="plotly">(.*?)</script>', html)
    assert gzip.decompress(base64.b64decode(packed)).decode() == source
    named = re.findall(r"'sha256-([^']+)'", policy(html))
    assert named == [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (*scripts, source)
    ]
    assert "unsafe-inline" not in policy(html).partition("script-src")[2]
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert EVIL not in data
    (line,) = json.loads(data)["lines"]
    assert line["color"] == looks(["lora"])["lora"].color  # as in the pictures
    assert EVIL not in line["points"][0]["note"]  # which plotly takes as HTML


def test_without_plotly_the_pictures_are_there_alone(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    explorer = Explorer([Line("a", [Point({"a": 1.0, "b": 2.0}, "n")])], {"a": "A", "b": "B"}, "a", "b")
    html = render_html(replace(report, sections=[replace(report.sections[0], explorer=explorer)]))
    assert "application/json" not in html
    assert "data:image/svg+xml" in html


def test_pictures_are_dark_on_a_dark_page_and_keep_their_colours() -> None:
    drawn = plot_bars({"": {"lora": Interval(1, 1, 1)}}, label="y")
    svg = rendered(drawn, "svg").decode()
    page = for_pages(svg.encode()).decode()
    ElementTree.fromstring(page)
    light, dark = (
        dict(re.findall(r"--g(\w\w):(#\w{6})", part)) for part in page.partition("@media")[::2]
    )  # fmt: skip
    assert light.keys() == dark.keys() >= {"00", "ff"}
    assert (light["00"], light["ff"]) == ("#000000", "#ffffff")
    brightness = {grey: sum(bytes.fromhex(shade[1:])) for grey, shade in dark.items()}
    assert brightness["00"] > 600 > 100 > brightness["ff"]
    restored = re.sub(r"<style>.*?</style>", "", page, count=1)
    restored = re.sub(r"var\(--g(\w\w)\)", lambda match: light[match[1]], restored)
    assert restored == svg  # nothing else has changed
    assert looks(["lora"])["lora"].color.lower() in page
    # What is written over shades stays.
    over = for_pages(rendered(plot_transfer({"m": [[0, 9]]}, ["a"], ["b", "c"], label="x", title="t"), "svg")).decode()
    assert {"#fefefe", "#010101"} <= set(re.findall(r"#\w{6}", over))


def test_page_fits_a_phone_and_aligns_numbers(report: Report) -> None:
    html = render_html(report)
    assert 'name="viewport" content="width=device-width' in html
    assert "tabular-nums" in html
    assert '<td class="number">1,234,567</td>' in html
    assert '<td class="number">–</td>' in html
    assert "<td>disel</td>" in html


def test_report_is_written_whole_or_not_at_all(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == render_html(report)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "–"), (True, "yes"), (1234567, "1,234,567"), (0.123456, "0.1235"), (2e-9, "2e-09"), ("as is", "as is")],
)
def test_cells(cell: object, text: str) -> None:
    assert show(cell) == text  # type: ignore[arg-type]


def test_which_columns_are_numbers() -> None:
    table = Table(["", "a", "b", "c"], [["x", 1, "0.5 [0.4, 0.6]", "1 or none"], ["y", None, "+0.1 ± 0.2", "none"]])
    assert table.numeric == [False, True, True, False]


def test_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        Table(["a", "b"], [["only"]], title="t")


def test_terminal_table_has_colours_in_a_terminal_only() -> None:
    table = rich_table(Table(["method", "loss"], [["[red]disel[/red]", "0.5"], ["lora", "10.25"]], title="T", note="N"))
    pipe, terminal = io.StringIO(), io.StringIO()
    Console(file=pipe, width=80).print(table)
    Console(file=terminal, width=80, force_terminal=True, color_system="standard").print(table)
    assert "\x1b" not in pipe.getvalue()
    assert "\x1b" in terminal.getvalue()
    assert "[red]disel[/red]" in pipe.getvalue()  # text is shown, not obeyed
    first, second = (line for line in pipe.getvalue().splitlines() if "disel" in line or "lora" in line)
    assert len(first.rstrip()) == len(second.rstrip())  # flush right


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_a_table_in_a_narrow_terminal_breaks_no_number_and_no_name(width: int) -> None:
    columns = ["module", "matrices", "effective rank", "nuclear norm", "energy", "by entropy", "stable", "99 %"]
    rows = [["down_proj", 30, "16.00", "3.3210 ± 0.0827", "1.0000", "12.04", "2.20", "13.97"]]
    text = io.StringIO()
    note = "How to read it, which takes the whole width of the screen."
    Console(file=text, width=width).print(rich_table(Table(columns, rows, title="Ranks of all", note=note)))
    shown = text.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    words = shown.split()
    for whole in ("down_proj", "30", "16.00", "3.3210", "±", "0.0827", "1.0000", "12.04", "2.20", "13.97"):
        assert whole in words
    for word in " ".join(columns).split():
        assert word in words
    assert shown.count("Ranks of all") == 1
    assert " ".join(words).endswith(note)
    # Every part names its rows; where there is room, there is one.
    assert shown.count("down_proj") == shown.count("─ \n")
    assert (shown.count("down_proj") == 1) == (width > 80)


def pixels(drawn: MplFigure) -> np.ndarray:
    return np.asarray(matplotlib.image.imread(io.BytesIO(rendered(drawn)), format="png"))


def has_colour(drawn: MplFigure, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(pixels(drawn)[..., :3] - wanted).max(-1) < 0.02).any())


def test_loss_curves_draw_every_run_and_skip_what_is_missing() -> None:
    records = [{"step": 0, "held_out_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"epoch": 1}]
    drawn = plot_losses({"a": records, "b": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]})
    assert has_colour(drawn, PALETTE[0])
    assert has_colour(drawn, PALETTE[1])
    assert pixels(plot_losses({})).ndim == 3


def test_bars_retention_and_landscape_are_drawn() -> None:
    numbers = {"base": Interval(0.1, 0.1, 0.1), "disel": Interval(0.5, 0.4, 0.6), "lora": Interval(0.3, 0.3, 0.3)}
    bars = plot_bars({"": numbers}, label="accuracy")
    assert has_colour(bars, "#999999")  # the base model, so that methods keep their colours from plot to plot
    disel, lora = (looks([name])[name].color for name in ("disel", "lora"))
    assert disel != lora
    assert has_colour(bars, disel)
    assert has_colour(bars, lora)
    other = next(colour for colour in PALETTE if colour not in (disel, lora))
    assert not has_colour(bars, other)
    distances = {"KL": {"disel": Interval(0.01, 0.01, 0.01)}, "shift": {"disel": Interval(-0.02, -0.02, -0.02)}}
    assert has_colour(plot_bars(distances, label="nats per token"), disel)
    rows = [
        {"kind": kind, "layer": layer, "effective_rank": layer}
        for kind in ("q", "v")
        for layer in (0, 1, None)
        if layer is not None
    ]
    small = plot_rank_heatmap(rows, "effective_rank")
    wide = [{**row, "layer": row["layer"] + 40 * n} for n in range(2) for row in rows]
    large = plot_rank_heatmap(wide, "effective_rank")
    assert pixels(small).shape[0] > 100
    assert pixels(large).ndim == 3


def test_plots_leave_pyplot_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_bars({"": {"a": Interval(1, 1, 1)}}, label="y")
    assert plt.get_fignums() == before


DRAWS_FILES = {
    "plot_gates", "plot_rank_landscape", "plot_rank_trajectory", "plot_retention_curves"
}  # fmt: skip


@pytest.mark.parametrize("there", ["picture.png", "picture.svg"])
def test_pictures_replace_no_file_unless_asked(there: str, tmp_path: Path) -> None:
    drawn = plot_losses({"a": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})
    (tmp_path / there).write_text("mine")
    with pytest.raises(ConfigError, match=f"{there}' exists already; .*overwrite=True"):
        save(drawn, tmp_path / "picture.png")
    assert [file.name for file in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"
    save(drawn, tmp_path / "picture.png", overwrite=True)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        save(drawn, tmp_path / "folder.png", overwrite=True)


def test_every_function_that_draws_into_a_file_asks_before_it_replaces_one() -> None:
    for module in pkgutil.iter_modules(drawing.__path__, "dynalora.drawing."):
        for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
            parameters = inspect.signature(function).parameters
            if name.startswith("plot_") and "path" in parameters:
                assert name in DRAWS_FILES
                assert parameters["overwrite"].default is False


def test_metric_panels_draw_the_panels_that_have_numbers() -> None:
    records = [{"step": step, "weight": 1 - step / 20, "ratio": step / 10} for step in range(1, 9)]
    panels = (
        Panel("weight", ("weight",)),
        Panel("both", ("weight", "ratio")),
        Panel("absent", ("nowhere",)),
        Panel("ratio", ("ratio",), log=True),
    )
    drawn = plot_metrics(records, panels)
    assert drawn is not None
    assert has_colour(drawn, PALETTE[1])  # the second curve of the second panel
    three = pixels(drawn).shape
    one = pixels(plot_metrics(records, panels[:1])).shape
    assert three[1] > 2.5 * one[1]
    assert three[0] == one[0]
    assert plot_metrics(records, panels[2:3]) is None
    assert plot_metrics([], panels) is None


def test_what_never_changes_is_not_drawn() -> None:
    records = [{"step": step, "weight": 0.5, "ratio": step / 10} for step in range(1, 9)]
    assert plot_metrics(records, [Panel("weight", ("weight",))]) is None
    drawn = plot_metrics(records, [Panel("weight", ("weight",)), Panel("both", ("weight", "ratio"))])
    assert drawn is not None
    (axis,) = drawn.axes
    assert axis.get_title() == "both"
    assert len(axis.lines) == 1


def test_all_colours_can_be_seen_on_light_and_on_dark_pages() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in PALETTE:
        for page in ("#ffffff", "#15181c"):
            low, high = sorted((luminance(colour), luminance(page)))
            # Black becomes light where the page is dark.
            assert (high + 0.05) / (low + 0.05) > 2 or (colour, page) == ("#000000", "#15181c")


def test_steps_are_counted_in_whole_numbers_and_names_of_columns_do_not_overlap() -> None:
    axis = plot_losses({"lora": [{"step": step, "loss": 1.0 / step} for step in range(1, 4)]}).axes[0]
    assert all(float(tick).is_integer() for tick in axis.get_xticks())
    drawn, axes = panels(4)
    heat_map(axes[0], np.zeros((4, 30)), columns=[str(layer) for layer in range(30)])
    drawn.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes[0].get_xticklabels()]
    assert len(boxes) > 4
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_method_has_one_look_everywhere() -> None:
    known = [*METHODS, *BASELINES]
    everything = looks(known)
    assert len({(style.color, style.marker) for style in everything.values()}) == len(known)
    for name, method in {**METHODS, **BASELINES}.items():
        # Alone, under its title, and beside labels that are no method's.
        assert looks([name])[name] == everything[name]
        assert looks([method.title])[method.title] == everything[name]
        assert looks(["mine", name])[name] == everything[name]


def test_other_labels_take_looks_that_no_method_in_the_figure_has() -> None:
    assert list(looks(["a", "b"]).values()) == [look(0), look(1)]
    mixed = looks(["a", *METHODS, "b", "base"])
    assert len({(style.color, style.marker) for style in mixed.values()}) == len(mixed)
    assert mixed == looks(["a", *METHODS, "b", "base"])
    assert mixed["base"].color not in PALETTE


def test_every_plot_returns_a_figure() -> None:
    plots = []
    for module in pkgutil.iter_modules(drawing.__path__, "dynalora.drawing."):
        for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
            if name.startswith("plot_"):
                plots.append(name)
                returned = inspect.signature(function).return_annotation
                assert returned in ("Figure", "Figure | None"), f"{name} returns {returned}"
    assert {"plot_gates", "plot_bars", "plot_rank_landscape", "plot_transfer"} <= set(plots)


def test_pictures_of_numbers_that_are_all_alike_are_left_out() -> None:
    assert not differing([Interval(0, 0, 0.1), 0.0, None])
    assert differing([Interval(0, 0, 0.1), 0.5])


@pytest.mark.parametrize(
    ("column", "decimals"),
    [
        ([(2.725, 0.0402)], 3), ([(2.725, 0.2)], 3), ([(2.7, 0.0995), (2.8, 3.0)], 3), ([(0.0032, 0.0023)], 4),
        ([(0.531, 0.05), (0.0032, 0.0023)], 4), ([(0.0001, 1e-9)], 4), ([], 4), ([(1.0, 0.0)], 4),
        ([(1.0, math.inf), (1.0, 0.2)], 3), ([(1.0, math.nan)], 4), ([(0.0, 0.001)], 4),
        ([(0.6921, 0.0008), (0.31, 0.046)], 3),  # a number that is known better than a reader needs
        ([(0.0028, 0.0146)], 3),  # a small difference, which is known no better than that
    ],
)  # fmt: skip
def test_a_column_has_the_decimals_that_its_numbers_are_worth(column: list[tuple[float, float]], decimals: int) -> None:
    intervals = [None, *(Interval(value, value - half, value + half) for value, half in column)]
    assert decimals_for(intervals) == decimals


def test_a_column_may_have_fewer_decimals() -> None:
    assert decimals_for([Interval(38.7, 36.7, 40.7), Interval(8.1, 7.6, 8.6)], least=1) == 2
    assert decimals_for([Interval(38.7, 26.7, 50.7)], least=1) == 1


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.02, 0.7, {"0.02", "0.05", "0.1", "0.2", "0.5"}),  # less than two powers of ten: 2 and 5 as well
        (0.001, 0.9, {"0.001", "0.01", "0.1"}),
        (0.25, 0.45, {"0.3", "0.4"}),  # no power of ten, nor 2 or 5
        (1e-7, 1e-3, {"1e-07", "1e-06", "1e-05", "0.0001", "0.001"}),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers_that_have_room(low: float, high: float, shown: set[str]) -> None:
    drawn, (axis,) = figure(6.6, 4.6)
    log_scale(axis)
    axis.plot([low, high], [0.0, 1.0])
    axis.set_xlim(low, high)
    drawn.canvas.draw()
    labels = [*axis.get_xticklabels(), *axis.get_xticklabels(minor=True)]
    places = {label.get_text(): label.get_position()[0] for label in labels if label.get_text()}
    assert {text for text, place in places.items() if low <= place <= high * 1.0001} == shown
