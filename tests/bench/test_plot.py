import dataclasses
import itertools
from pathlib import Path

import pytest
from bench import tiny_suite
from bench.test_results import ROW
from bench.test_scaling import grown
from matplotlib.image import imread

from tilework.bench import plot, scaling, suites
from tilework.bench.results import Row


def rows(*, sizes: tuple[int, ...] = (64, 128, 256)) -> list[Row]:
    return [
        dataclasses.replace(
            ROW,
            case=f"work n={n} m=3",
            sizes={"n": n, "m": 3},
            dtype=dtype,
            candidate=candidate,
            peer=candidate != "tilework s",
            flops=n,
            median=n / 100,
            q1=n / 110,
            q3=n / 90,
            peak_bytes=None if candidate == "peer b" else n * 10**6,
        )
        for n, dtype, candidate in itertools.product(
            sizes, ("float32", "bfloat16"), ("tilework s", "peer a", "peer b")
        )
    ]


def test_figures_are_saved_in_both_formats(tmp_path: Path) -> None:
    limits = {"matmul_flops_per_second": 4e9, "copy_bytes_per_second": 4e9}
    limited = [dataclasses.replace(row, limits=limits, traffic_bytes=10) for row in rows()]
    paths = plot.save(limited, tmp_path / "new", "r")
    assert sorted(path.name for path in paths) == [
        "r-s-roofline.png",
        "r-s-roofline.svg",
        "r-s-work-bars.png",
        "r-s-work-bars.svg",
        "r-s-work-by-n.png",
        "r-s-work-by-n.svg",
    ]
    again = plot.save(limited, tmp_path / "again", "r")
    for path, same in zip(paths, again, strict=True):
        assert path.read_bytes() == same.read_bytes()
        if path.suffix == ".png":
            image = imread(path)
            assert image.shape[1] >= 1000
            assert image.std() > 0.05
        else:
            assert "<svg" in path.read_text()


def test_bars_show_the_largest_case_sorted_and_ours_in_bold() -> None:
    shuffled = sorted(rows(sizes=(256,)), key=lambda row: row.candidate)
    for row in shuffled[:2]:
        row.median, row.q1, row.q3 = 0.5, 0.4, 0.6
    figure = plot.bars(shuffled)
    assert len(figure.axes) == 4
    names = figure.axes[0].get_yticklabels()
    assert {name.get_text(): name.get_weight() for name in names}["tilework s"] == "bold"
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == sorted(widths, reverse=True)
    labels = [text.get_text().strip() for axes in figure.axes for text in axes.texts]
    assert "2.56 s" in labels
    assert "256 MB" in labels
    assert "not measured" in labels


def test_a_roofline_has_every_row_under_the_limits_of_the_run() -> None:
    limits = {"matmul_flops_per_second": 400e9, "copy_bytes_per_second": 40e9}
    drawn = [
        dataclasses.replace(
            row, flops=row.sizes["n"] * 10**9, traffic_bytes=10**8, limits=limits, dtype="float32"
        )
        for row in rows()
        if row.dtype == "float32"
    ]
    figure = plot.roofline(drawn)
    (axes,) = figure.axes
    roof, *points = axes.get_lines()
    x, y = roof.get_data()
    assert max(y) == 400
    assert y[0] == pytest.approx(40 * x[0])
    middle = [line for line in points if line.get_color() == plot._colors(drawn)["peer a"]]
    for line, row in zip(middle, [one for one in drawn if one.candidate == "peer a"], strict=True):
        (place,), (height,) = line.get_data()
        assert place == pytest.approx(row.flops / 1e8)
        assert height == pytest.approx(row.flops / row.median / 1e9)
    assert len(points) == len(drawn)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["matrix product 400 GFLOP/s", "copy 40 GB/s"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["tilework s", "peer a", "peer b"]


def test_limits_that_differ_make_a_band() -> None:
    first, second = (
        dataclasses.replace(
            ROW,
            flops=10**9,
            traffic_bytes=10**8,
            limits={"matmul_flops_per_second": rate, "copy_bytes_per_second": 1e9},
        )
        for rate in (1e9, 3e9)
    )
    (axes,) = plot.roofline([first, second]).axes
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert {1.0, 3.0} <= set(heights)
    assert max(axes.get_lines()[0].get_ydata()) == 2


@pytest.mark.parametrize("unit", [1e-7, 1e-2, 1e3])
@pytest.mark.parametrize("draw", ["bars", "lines", "roofline"])
def test_labels_are_neither_clipped_nor_in_each_others_way(draw: str, unit: float) -> None:
    limits = {"matmul_flops_per_second": 4e8, "copy_bytes_per_second": 4e9}
    drawn = [
        dataclasses.replace(
            row,
            candidate=row.candidate + " of a long name" * (row.candidate != "tilework s"),
            limits=limits,
            traffic_bytes=10**6,
            peak_bytes=row.peak_bytes and row.peak_bytes * 10**4,
            **{name: getattr(row, name) * unit for name in ("median", "q1")},
            q3=row.q3 * unit * 3,
        )
        for row in rows(sizes=(25, 26, 27, 28, 1000))
    ]
    if draw == "bars":
        figure = plot.bars([row for row in drawn if row.sizes["n"] == 1000])
    else:
        figure = plot.lines(drawn, "n") if draw == "lines" else plot.roofline(drawn)
    figure.draw_without_rendering()
    for axes in figure.axes:
        edge = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert edge.x0 <= box.x0, text
            assert box.x1 <= edge.x1 + 0.5, text
            assert edge.y0 <= box.y0 + 1, text
        if draw == "bars":
            assert all(len(axes.texts) == 3 for axes in figure.axes)
        for axis in (axes.xaxis, axes.yaxis):
            shown = [
                tick.label1.get_window_extent()
                for tick in axis.get_major_ticks()
                if tick.label1.get_visible()
                and axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
            ]
            for one, other in itertools.combinations(shown, 2):
                assert not one.overlaps(other), axis.get_label_text()
            for box in shown:
                assert box.x0 >= 0
                assert box.x1 <= figure.bbox.x1


def test_figures_of_disturbed_measurements_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "discover", lambda: {"tiny_suite": tiny_suite.SUITE})
    limits = {"matmul_flops_per_second": 4e8, "copy_bytes_per_second": 4e9}
    for busy in (0.0, 1.5):
        drawn = [dataclasses.replace(row, limits=limits, traffic_bytes=10) for row in rows()]
        grew = grown()
        drawn[-1].others_cpus = grew[-1].others_cpus = busy
        (fit,) = scaling.fits(grew)
        for figure in (
            plot.bars([row for row in drawn if row.sizes["n"] == 256]),
            plot.lines(drawn, "n"),
            plot.roofline(drawn),
            plot.growth([fit]),
        ):
            title = figure.get_suptitle()
            assert ("not sound: other processes kept 1.5 CPUs busy" in title) == bool(busy)


def test_growth_is_drawn_with_its_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suites, "discover", lambda: {"tiny_suite": tiny_suite.SUITE})
    (fit,) = scaling.fits(grown())
    figure = plot.growth([fit])
    axes = figure.axes[0]
    points, line = axes.get_lines()
    assert list(points.get_ydata()) == [row.median for row in fit.rows]
    assert list(line.get_ydata()) == pytest.approx([row.median for row in fit.rows])
    assert axes.get_legend().get_texts()[0].get_text() == "square: 1.50 ± 0.00, expected 2.00"
    names = {path.name for path in plot.save(grown(), tmp_path, "r")}
    assert {"r-scaling.png", "r-scaling.svg"} <= names


def test_a_series_needs_three_values_of_one_size() -> None:
    assert [size for size, _ in plot.series(rows())] == ["n"]
    assert plot.series(rows(sizes=(64, 128))) == []


def test_lines_hold_the_measured_points() -> None:
    figure = plot.lines(rows(), "n")
    time, memory = figure.axes[:2]
    line = next(line for line in time.get_lines() if line.get_label() == "tilework s")
    assert list(zip(*line.get_data(), strict=True)) == [(64, 0.64), (128, 1.28), (256, 2.56)]
    assert {line.get_label() for line in memory.get_lines()} == {"tilework s", "peer a"}


def test_candidates_have_colors_of_their_own() -> None:
    many = [dataclasses.replace(ROW, candidate=f"peer {n}", peer=True) for n in range(8)]
    assert len(set(plot._colors([ROW, *many]).values())) == 9


@pytest.mark.parametrize("status", ["refused", "missing", "failed"])
def test_what_was_not_measured_is_not_drawn(tmp_path: Path, status: str) -> None:
    dropped = [dataclasses.replace(row, status=status) for row in rows()]
    assert plot.save(dropped, tmp_path, "r") == []


def test_results_of_several_devices_go_to_files_of_their_own(tmp_path: Path) -> None:
    elsewhere = [dataclasses.replace(row, device_name="a slide rule") for row in rows()]
    assert len(set(plot.save(rows() + elsewhere, tmp_path, "r"))) == 8
