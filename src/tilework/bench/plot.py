"""``tilework plot``: figures from rows alone, so that any machine's results can be drawn."""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator

from tilework.bench import report, scaling
from tilework.bench.results import OK, Row, disturbance
from tilework.bench.timing import COPY, PRODUCT

T = TypeVar("T")

FORMATS = ("png", "svg")
FEWEST_POINTS = 3  # of a series over one size
OURS = ("#0b6e4f", "#4fb286", "#a3d9c0", "#7fb800")
PEERS = ("#d1495b", "#edae49", "#00798c", "#7b5ea7", "#8d6a4f", "#5f6b7a", "#c06c9a", "#9aa84f")


@dataclass(frozen=True)
class Quantity:
    """What an axis shows."""

    label: str
    value: Callable[[Row], float | None]
    text: Callable[[float], str]


TIME = Quantity("time", lambda row: row.median, report.duration)
MEMORY = Quantity(
    "peak extra memory",
    lambda row: None if row.peak_bytes is None else row.peak_bytes / 1e6,
    lambda megabytes: report.size(round(megabytes * 1e6)),
)
QUANTITIES = (TIME, MEMORY)


def save(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Draw all figures that the rows allow, and return the files written.

    Bars for the largest case of each kind of work, a series where one size takes at least three
    values while the others stay, a roofline for each suite, and the fits of growing work.
    """
    measured = [row for row in rows if row.status == OK and row.median is not None]
    figures: dict[str, Figure] = {}
    groups = _group(measured, lambda row: (row.suite, row.kind, row.device_name))
    for number, group in enumerate(groups):
        first = group[0]
        name = f"{stem}-{first.suite}-{first.kind}"
        if len({row.device_name for row in measured}) > 1:
            name += f"-{number}"
        largest = max(group, key=lambda row: row.flops or 0).case
        figures[f"{name}-bars"] = bars([row for row in group if row.case == largest])
        for size, points in series(group):
            figures[f"{name}-by-{size}"] = lines(points, size)
    by_suite = _group(
        [row for row in measured if row.limits], lambda row: (row.suite, row.device_name)
    )
    for number, group in enumerate(by_suite):
        name = f"{stem}-{group[0].suite}-roofline"
        figures[f"{name}-{number}" if name in figures else name] = roofline(group)
    fits = scaling.fits(measured)
    if fits:
        figures[f"{stem}-scaling"] = growth(fits)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        safe = re.sub(r"[^\w.-]+", "-", name)
        for suffix in FORMATS:
            path = folder / f"{safe}.{suffix}"
            # The same rows give the same file.
            with matplotlib.rc_context({"svg.hashsalt": "tilework"}):
                figure.savefig(path, dpi=130, metadata={"Date": None} if suffix == "svg" else {})
            paths.append(path)
    return paths


def series(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The sizes over which there is a series, each with the rows of its longest one."""
    found = []
    for size in rows[0].sizes:
        others = _group(rows, partial(_sizes_without, size))
        longest = max(others, key=lambda group: len({row.sizes[size] for row in group}))
        if len({row.sizes[size] for row in longest}) >= FEWEST_POINTS:
            found.append((size, longest))
    return found


def _sizes_without(size: str, row: Row) -> object:
    return tuple(value for name, value in row.sizes.items() if name != size)


def bars(rows: Sequence[Row]) -> Figure:
    """One bar for each candidate: a row of panels for each dtype, a column for each quantity."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    most = max(sum(row.dtype == dtype for row in rows) for dtype in dtypes)
    figure = Figure(figsize=(10, 0.9 + len(dtypes) * (0.75 + 0.33 * most)), layout="constrained")
    figure.suptitle(_title(rows, rows[0].case))
    panels = figure.subplots(len(dtypes), len(QUANTITIES), squeeze=False)
    colors = _colors(rows)
    for dtype, line in zip(dtypes, panels, strict=True):
        members = sorted(
            (row for row in rows if row.dtype == dtype), key=lambda row: -(row.median or 0)
        )
        for quantity, axes in zip(QUANTITIES, line, strict=True):
            _draw_bars(axes, members, quantity, colors)
            axes.set_title(f"{quantity.label}, {dtype}", fontsize=10, loc="left")
        line[1].set_yticklabels([])
    return _fit(figure)


def _draw_bars(axes: Axes, rows: Sequence[Row], quantity: Quantity, colors: dict[str, str]) -> None:
    values = [quantity.value(row) or 0.0 for row in rows]
    names = [row.candidate for row in rows]
    axes.barh(names, values, color=[colors[name] for name in names], height=0.7)
    if quantity is TIME:
        spread = [
            [value - (row.q1 or value) for row, value in zip(rows, values, strict=True)],
            [(row.q3 or value) - value for row, value in zip(rows, values, strict=True)],
        ]
        axes.errorbar(values, names, xerr=spread, fmt="none", ecolor="#333333", elinewidth=1)
    ends = [
        max(value, (quantity is TIME and row.q3) or 0)
        for row, value in zip(rows, values, strict=True)
    ]
    for row, value, end in zip(rows, values, ends, strict=True):
        axes.annotate(
            "not measured" if quantity.value(row) is None else quantity.text(value),
            (end, row.candidate),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xlim(0, max(ends, default=0) or 1)
    axes.xaxis.set_major_formatter(partial(_tick, quantity))
    for name in axes.get_yticklabels():
        name.set_fontweight("bold" if name.get_text().startswith("tilework") else "normal")
    _quiet(axes)


def _tick(quantity: Quantity, value: float, position: int | None) -> str:
    return quantity.text(value) if value else "0"


def lines(rows: Sequence[Row], size: str) -> Figure:
    """Each candidate over one size, both axes logarithmic."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = Figure(figsize=(10, 0.9 + 3.4 * len(dtypes)), layout="constrained")
    fixed = " ".join(f"{name}={value}" for name, value in rows[0].sizes.items() if name != size)
    figure.suptitle(_title(rows, f"{rows[0].kind} {fixed}"))
    panels = figure.subplots(len(dtypes), len(QUANTITIES), squeeze=False)
    colors = _colors(rows)
    for dtype, line in zip(dtypes, panels, strict=True):
        for quantity, axes in zip(QUANTITIES, line, strict=True):
            for name, color in colors.items():
                points = sorted(
                    (row.sizes[size], value)
                    for row in rows
                    if (row.dtype, row.candidate) == (dtype, name)
                    and (value := quantity.value(row)) is not None
                )
                ours = name.startswith("tilework")
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=color,
                        label=name,
                        marker="o",
                        markersize=5 if ours else 4,
                        linewidth=2.4 if ours else 1.3,
                        zorder=3 if ours else 2,
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted({row.sizes[size] for row in rows})
            axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(partial(_tick, quantity))
            axes.set_xlabel(size)
            axes.set_title(f"{quantity.label}, {dtype}", fontsize=10, loc="left")
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            _quiet(axes)
    handles = {str(line.get_label()): line for axes in panels.flat for line in axes.get_lines()}
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=3, frameon=False)
    return _fit(figure)


def roofline(rows: Sequence[Row]) -> Figure:
    """Operations per second over operations per byte, under the limits of the same run.

    Both count what the definition needs, so that work done twice looks slow. The limits are those
    beside the rows, which differ a little between cases: the band has their extremes. Candidates
    of one intensity stand side by side.
    """
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = Figure(figsize=(10, 1.4 + 3.6 * len(dtypes)), layout="constrained")
    figure.suptitle(_title(rows, "operations per second by operational intensity"))
    panels = figure.subplots(len(dtypes), 1, squeeze=False)
    colors = _colors(rows)
    markers = dict(zip(dict.fromkeys(row.kind for row in rows), "osD^vP*X<>", strict=False))
    for dtype, axes in zip(dtypes, panels[:, 0], strict=True):
        members = [row for row in rows if row.dtype == dtype]
        grid = _draw_roof(axes, members)
        names = [name for name in colors if any(row.candidate == name for row in members)]
        for row in members:
            aside = (names.index(row.candidate) - (len(names) - 1) / 2) * 0.007
            axes.plot(
                _intensity(row) * (grid[-1] / grid[0]) ** aside,
                (row.flops or 0) / (row.median or 1.0) / 1e9,
                markers.get(row.kind, "o"),
                color=colors[row.candidate],
                markersize=6 if row.peer else 9,
                markeredgecolor="white",
                zorder=2 if row.peer else 3,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.set_xlabel("operations per byte")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(dtype, fontsize=10, loc="left")
        axes.grid(color="#eeeeee", linewidth=0.6)
        _quiet(axes)
    handles = [
        Line2D([], [], color=color, marker="s", linestyle="", label=name)
        for name, color in colors.items()
    ]
    if len(markers) > 1:
        handles += [
            Line2D([], [], color="#333333", marker=marker, linestyle="", label=kind)
            for kind, marker in markers.items()
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _fit(figure)


def _intensity(row: Row) -> float:
    return (row.flops or 0) / (row.traffic_bytes or 1)


def _draw_roof(axes: Axes, rows: Sequence[Row]) -> list[float]:
    """The limits, from a bit left of all rows to a bit right of them and of the ridge."""
    limits = [(row.limits[PRODUCT] / 1e9, row.limits[COPY] / 1e9) for row in rows]
    products, copies = zip(*limits, strict=True)
    ridges = [product / copy for product, copy in limits]
    places = [_intensity(row) for row in rows]
    grid = np.geomspace(min(places + ridges) / 3, max(places + ridges) * 3, 200)
    low, middle, high = (
        np.minimum(pick(products), grid * pick(copies)) for pick in (min, statistics.median, max)
    )
    axes.fill_between(grid, low, high, color="#dddddd", linewidth=0, zorder=0)
    axes.plot(grid, middle, color="#555555", linewidth=1.5, zorder=1)
    product, copy = statistics.median(products), statistics.median(copies)
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": "#555555"}
    axes.annotate(
        f"matrix product {product:.3g} GFLOP/s", (grid[-1], product), (0, 6), ha="right", **style
    )
    axes.annotate(
        f"copy {copy:.3g} GB/s", (grid[0], min(product, grid[0] * copy)), (8, -12), **style
    )
    return [float(place) for place in grid]


def growth(fits: Sequence[scaling.Fit]) -> Figure:
    """Measured times over each growing size, with the fitted power law."""
    groups = _group(fits, lambda fit: (fit.rows[0].suite, fit.over))
    height = -(-len(groups) // 2)
    figure = Figure(figsize=(10, 0.9 + 3.3 * height), layout="constrained")
    rows = [row for fit in fits for row in fit.rows]
    figure.suptitle(_title(rows, "time of the default implementation by size", suite=False))
    panels = figure.subplots(height, 2, squeeze=False).flat
    for axes, group in zip(panels, groups, strict=False):
        for fit, color in zip(group, (OURS[0], *PEERS), strict=False):
            times = [row.median for row in fit.rows]
            axes.plot(fit.sizes, times, "o", color=color, markersize=5)
            axes.plot(
                fit.sizes,
                [fit.scale * size**fit.exponent for size in fit.sizes],
                color=color,
                linewidth=1.3,
                label=f"{fit.rows[0].kind}: {fit.exponent:.2f} ± {fit.error:.2f}, "
                f"expected {fit.expected:.2f}",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(group[0].over)
        axes.set_ylabel("s")
        axes.set_title(f"{group[0].rows[0].suite}", fontsize=10, loc="left")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.margins(y=0.25)
        _quiet(axes)
    for axes in panels:
        axes.set_axis_off()
    return _fit(figure)


def _title(rows: Sequence[Row], what: str, *, suite: bool = True) -> str:
    row = rows[0]
    threads = f", {row.threads} threads" if row.threads else ""
    title = f"{row.suite}: {what}" if suite else what
    place = f"{row.device_name}{threads}, torch {row.versions.get('torch')}"
    return "\n".join(filter(None, (title, place, disturbance(rows))))


def _fit(figure: Figure) -> Figure:
    """Give labels of bars the room that they take, and drop labels of ticks that would collide."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        if axes.patches:
            _make_room(axes)
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            _thin_out(axis)
    return figure


def _make_room(axes: Axes) -> None:
    """Widen the scale, which begins at 0, until each label ends within the axes."""
    box, (_, high) = axes.get_window_extent(), axes.get_xlim()
    for label in axes.findobj(Annotation):
        assert isinstance(label, Annotation)
        place = label.xy[0]
        end = axes.transData.transform((place, 0))[0] - box.x0
        room = box.width - (label.get_window_extent().x1 - box.x0 - end)
        high = max(high, place * box.width / room)
    axes.set_xlim(0, high)


def _thin_out(axis: Axis) -> None:
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    last = None
    for tick in sorted(ticks, key=lambda tick: tick.get_loc()):
        box = tick.label1.get_window_extent()
        if last is not None and box.padded(2).overlaps(last):
            tick.label1.set_visible(False)
        else:
            last = box


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    colors: dict[str, str] = {}
    for peer, palette in ((False, OURS), (True, PEERS)):
        names = dict.fromkeys(row.candidate for row in rows if row.peer == peer)
        colors |= {name: palette[index % len(palette)] for index, name in enumerate(names)}
    return colors


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _group(rows: Sequence[T], key: Callable[[T], object]) -> list[list[T]]:
    groups: dict[object, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
