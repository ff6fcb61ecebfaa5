from pathlib import Path

import pytest
import torch
from bench import tiny_suite
from bench.test_results import ROW, write
from typer.testing import CliRunner, Result

from tilework.bench import results, suites
from tilework.bench.cli import app

FAST = ("--seconds", "0.01", "--no-memory", "--device", "cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "discover", lambda: {"tiny_suite": tiny_suite.SUITE})
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def slower(path: Path, factor: float) -> Path:
    """The same results from a machine that was faster by a factor."""
    rows = results.read(path)
    for row in rows:
        if row.median is not None:
            row.median, row.q1, row.q3 = (v / factor for v in (row.median, row.q1, row.q3))
    return write(path.with_name(f"{factor}.jsonl"), *rows)


def test_list_shows_all_families_or_one() -> None:
    everything = run("list")
    assert everything.exit_code == 0
    assert "tilework.losses.linear_cross_entropy" in everything.stdout
    assert "tilework.norms." in everything.stdout
    assert "tilework.norms." not in run("list", "losses").stdout


def test_show_prints_a_public_name() -> None:
    result = run("show", "linear_cross_entropy")
    assert result.exit_code == 0
    assert "tilework.losses.linear_cross_entropy(" in result.stdout
    assert "https://arxiv.org/abs/2411.09009" in result.stdout


def test_doctor_reports() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.stdout
    assert "losses.linear_cross_entropy" in result.stdout


def test_doctor_tells_the_costs_of_a_head() -> None:
    result = run("doctor", "--head", "2048,768,50304", "--dtype", "float32")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if " cpu " in line]
    assert ["cpu", "│", "again", "│", "0.633", "T"] in [row[1:7] for row in rows]
    assert ["cpu", "│", "chunks", "│", "0.475", "T", "│", "98", "MiB", "│", "yes"] in [
        row[1:12] for row in rows
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "lossy"), "FAMILY: must be one of losses, norms,"),
        (("show", "linear_crossentropy"), "did you mean tilework.losses.linear_cross_entropy"),
        (("show", "zzzzzz"), "see `tilework list`"),
        (("doctor", "--head", "8,9"), "--head: three sizes above 0 are accepted, got '8,9'"),
        (("doctor", "--head", "8,9,0"), "--head: three sizes above 0 are accepted"),
        (("doctor", "--head", "8,9,7", "--dtype", "int8"), "--dtype: must be one of float64,"),
        (("bench", "no_suite"), "SUITE: must be among tiny_suite, got no_suite"),
        (("bench", "--dtype", "float8"), "--dtype: must be one of float64, float32,"),
        (("bench", "--device", "abacus"), "--device: must be one of cpu"),
        (("bench", "--against", "magic"), "--against: must be none or a part of torch eager,"),
        (("bench", "--filter", "n=99"), "--filter: no case matches 'n=99'"),
        (("bench", "--seconds", "-1"), "--seconds"),
        (("bench", "--compare", "no_file.jsonl"), "--compare: no_file.jsonl cannot be read"),
        (("bench", "--filter", "n=1000", "--out", "."), "--out: cannot be written"),
        (("plot", "no_file.jsonl"), "RESULTS: no_file.jsonl cannot be read"),
    ],
)
def test_bad_input_names_the_argument_and_ends_with_2(
    arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_bench_lists_its_suites_without_measuring() -> None:
    result = run("bench", "--list", "--device", "cpu")
    assert result.exit_code == 0
    assert "square n=4000" in result.stdout
    assert "peer nan" in result.stdout


def test_bench_prints_a_table_and_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    result = run("bench", "tiny_suite", "--filter", "n=1000", "--out", out, *FAST)
    assert result.exit_code == 0
    assert "tilework wrong: refused, the error of square is 0.016" in result.stdout
    assert "peer broken: failed, RuntimeError: out of luck" in result.stdout
    rows = results.read(out)
    assert [row.candidate for row in rows] == [one.name for one in tiny_suite.SUITE.candidates]
    assert [row.status for row in rows].count("ok") == 3
    assert {row.peak_bytes for row in rows} == {None}
    assert f"{len(rows)} rows in" in result.stdout


@pytest.mark.untyped
def test_memory_is_measured_unless_it_is_declined(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = ("--filter", "n=1000", "--against", "none", "--seconds", 0, "--device", "cpu")
    assert run("bench", *options, "--out", out).exit_code == 0
    square = results.read(out)[0]
    assert square.candidate == "tilework square"
    assert 0 <= square.peak_bytes < 10**6, square.notes


def test_quick_dtype_and_against_choose(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = ("--quick", "--dtype", "float64", "--against", "nan", "--out", out)
    assert run("bench", *options, *FAST).exit_code == 0
    rows = results.read(out)
    assert {(row.case, row.dtype) for row in rows} == {("square n=16", "float64")}
    assert {row.candidate for row in rows} == {"tilework square", "tilework wrong", "peer nan"}


def test_control_c_leaves_the_rows_measured_so_far(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    result = run("bench", "--filter", "n=8", "--out", out, *FAST)
    assert result.exit_code == 130
    assert "Interrupted after 10 rows" in result.stdout
    assert "Traceback" not in result.output
    assert {row.case for row in results.read(out)} == {"square n=8"}


@pytest.mark.parametrize(("factor", "status"), [(100.0, 1), (0.01, 0)])
def test_compare_ends_with_1_after_a_regression(tmp_path: Path, factor: float, status: int) -> None:
    out = tmp_path / "r.jsonl"
    options = ("--filter", "n=1000", "--against", "none", *FAST)
    run("bench", *options, "--out", out)
    result = run("bench", *options, "--compare", slower(out, factor))
    assert result.exit_code == status
    assert ("regression: tiny_suite square n=1000 float32" in result.stdout) == bool(status)
    assert ("No regression" in result.stdout) != bool(status)


def test_plot_writes_figures(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", ROW)
    result = run("plot", file, "--out", tmp_path / "figures")
    assert result.exit_code == 0
    paths = [Path(line) for line in "".join(result.stdout).splitlines()]
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_plot_refuses_results_without_a_measurement(tmp_path: Path) -> None:
    row = results.Row(**{**ROW.__dict__, "status": "missing", "median": None})
    result = run("plot", write(tmp_path / "r.jsonl", row))
    assert result.exit_code == 2
    assert "nothing to plot" in result.stderr
