import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench import tiny_suite
from bench.test_results import ROW, write
from typer.testing import CliRunner, Result

import tilework
from tilework.bench import results, suites, timing
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
    assert " losses.linear_cross_entropy " in everything.stdout
    assert " norms." in everything.stdout
    assert " norms." not in run("list", "losses").stdout
    for family in tilework.FAMILIES:
        empty = not getattr(tilework, family).__all__
        assert ("has no public names yet" in run("list", family).stdout) == empty


def test_the_version_is_told() -> None:
    assert run("--version").stdout == f"tilework {tilework.__version__}\n"


def test_show_prints_a_public_name() -> None:
    result = run("show", "linear_cross_entropy")
    assert result.exit_code == 0
    assert "tilework.losses.linear_cross_entropy(" in result.stdout
    assert "https://arxiv.org/abs/2411.09009" in result.stdout
    assert (
        "tilework.attention.BlockLayout.from_window("
        in run("show", "BlockLayout.from_window").stdout
    )


def test_doctor_reports() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.stdout
    assert "losses.linear_cross_entropy" not in result.stdout
    assert "losses.linear_cross_entropy" in run("doctor", "--all").stdout


def test_doctor_tells_the_costs_of_a_head() -> None:
    result = run("doctor", "--head", "2048,768,50304", "--dtype", "float32")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if " cpu " in line]
    assert ["cpu", "│", "tiled", "│", "0.633", "T"] in [row[1:7] for row in rows]
    assert ["cpu", "│", "chunked", "│", "0.475", "T", "│", "98", "MiB", "│", "yes"] in [
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
        (("bench", "--resume"), "--resume: needs --out"),
        (("bench", "--filter", "n=8", "--resume", "--out", "."), "--out: . cannot be read"),
        (("bench", "--quick", "--scaling"), "--scaling: has no quick cases"),
        (("plot", "no_file.jsonl"), "RESULTS: no_file.jsonl cannot be read"),
        (("table", "no_file.jsonl"), "RESULTS: no_file.jsonl cannot be read"),
        (("page", "no_page.md"), "PAGE: no_page.md cannot be read"),
        (("tune", "no_kernel"), "KERNEL: must be one of linear_cross_entropy.forward,"),
        (("tune", "linear_cross_entropy.forward", "--device", "cpu"), "measured on a GPU"),
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


@pytest.mark.parametrize(("then", "now"), [(0.0, 0.0), (1.5, 0.0), (0.0, 1.5)])
def test_a_comparison_of_disturbed_measurements_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: float, now: float
) -> None:
    out, old = tmp_path / "r.jsonl", tmp_path / "old.jsonl"
    options = ("--filter", "n=1000", "--against", "none", *FAST)
    monkeypatch.setattr(timing.Others, "cpus", lambda others: now)
    run("bench", *options, "--out", out)
    rows = results.read(slower(out, 0.01))
    write(old, *(dataclasses.replace(row, others_cpus=then) for row in rows))
    # What is not compared does not count.
    write(old, dataclasses.replace(ROW, others_cpus=9.0))
    shown = " ".join(run("bench", *options, "--compare", old).stdout.split())
    said = "This comparison is not sound: other processes kept 1.5 CPUs busy" in shown
    assert said == ("This comparison is not sound" in shown) == bool(then or now)


def test_what_is_short_of_time_begins_with_the_first_cases_of_all_suites(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = dataclasses.replace(tiny_suite.SUITE, module="x.one")
    monkeypatch.setattr(suites, "discover", lambda: {"one": one, "tiny_suite": tiny_suite.SUITE})
    shown = run("bench", "--minutes", "1e-9", "--filter", "000", "--against", "none", *FAST).stdout
    assert "Out of time, not measured: " + ", ".join(
        f"{suite} square n={size} float32"
        for size in (1000, 4000)
        for suite in ("one", "tiny_suite")
    ) in " ".join(shown.split())


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


def test_resume_measures_only_what_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = ("bench", "--out", out, "--against", "none", *FAST)
    run(*options, "--filter", "n=1000")
    first = out.read_text()
    assert len(first.splitlines()) == 2

    out.write_text(first + first[:50])  # a run that was killed
    again = run(*options, "--filter", "000", "--resume")
    assert again.exit_code == 0
    assert "2 rows are in" in again.stdout
    assert "1 cases are left" in again.stdout
    assert "n=4000" in again.stdout
    assert "4 rows in" in again.stdout
    assert out.read_text().startswith(first)
    assert [row.sizes["n"] for row in results.read(out)] == [1000, 1000, 4000, 4000]

    everything = out.read_text()
    assert "0 cases are left" in run(*options, "--filter", "000", "--resume").stdout
    assert out.read_text() == everything
    run(*options, "--filter", "000")
    assert len(out.read_text().splitlines()) == 8


def test_resume_measures_again_what_other_software_measured(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = ("bench", "--out", out, "--against", "none", "--filter", "n=1000", *FAST)
    run(*options)
    rows = results.read(out)
    out.unlink()
    write(out, *(results.Row(**{**row.__dict__, "commit": "elsewhere"}) for row in rows))
    result = run(*options, "--resume")
    assert "already" not in result.stdout
    assert len(out.read_text().splitlines()) == 4


def test_rows_that_are_there_already_are_compared_too(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = ("--filter", "n=1000", "--against", "none", *FAST)
    run("bench", *options, "--out", out)
    old = slower(out, 100.0)
    result = run("bench", *options, "--out", out, "--resume", "--compare", old)
    assert result.exit_code == 1
    assert "regression: tiny_suite square n=1000 float32" in result.stdout


def test_out_of_time_names_what_was_not_measured(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = ("--filter", "000", "--against", "none", "--out", out, *FAST)
    result = run("bench", "--minutes", "1e-9", *options)
    assert result.exit_code == 0
    assert (
        "Out of time, not measured: tiny_suite square n=1000 float32, "
        "tiny_suite square n=4000 float32"
    ) in " ".join(result.stdout.split())
    assert out.read_text() == ""
    assert "Out of time" not in run("bench", "--minutes", "5", *options).stdout


def test_quick_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.bench import cli

    monkeypatch.setattr(cli, "QUICK_MINUTES", 1e-9)
    assert "Out of time" in run("bench", "--quick", *FAST).stdout
    options = ("bench", "--quick", "--minutes", "5", "--against", "none", *FAST)
    assert "Out of time" not in run(*options).stdout


def test_scaling_measures_growing_work_without_peers(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    assert run("bench", "--scaling", "--filter", "n=1", "--out", out, *FAST).exit_code == 0
    rows = results.read(out)
    assert {row.peer for row in rows} == {False}
    assert [row.sizes["n"] for row in rows[::2]] == [16, 128, 1024]


def test_a_device_that_does_not_answer_ends_the_run_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilework.bench import runner

    monkeypatch.setattr(runner, "answers", lambda device: False)
    out = tmp_path / "r.jsonl"
    result = run("bench", "--filter", "000", "--against", "none", "--out", out, *FAST)
    assert result.exit_code == 3
    assert "go on with --resume" in result.stdout
    assert {row.sizes["n"] for row in results.read(out)} == {1000}


def test_table_prints_markdown(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", ROW)
    result = run("table", file)
    assert result.exit_code == 0
    assert "| **tilework s** | 1 s |" in result.stdout
    result = run("table", file, "--filter", "n=7")
    assert result.exit_code == 2
    assert "--filter: no case matches 'n=7'" in " ".join(result.stderr.split())


def test_page_writes_the_tables_into_a_page(tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", ROW)
    page = tmp_path / "page.md"
    page.write_text("<!-- table r.jsonl -->\n<!-- end -->\n")
    assert run("page", page).exit_code == 0
    assert "| **tilework s** | 1 s |" in page.read_text()


@pytest.mark.untyped
def test_tune_prints_the_entry_for_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tilework.bench import cli, tune

    monkeypatch.undo()
    monkeypatch.setattr(cli, "_device", lambda name: torch.device("cuda"))
    problems = []

    class Problem:
        def __init__(self, kernel, case, dtype, device):
            problems.append((case, dtype))
            self.place = _triton.Place("sm_90", dtype)

    entry = {"block_rows": 1, "block_columns": 2, "block_inner": 3, "num_warps": 4, "num_stages": 5}
    outcome = tune.Outcome(entry, (1e-3, 2e-3), 9, [(entry, "no")], "the time is over")
    monkeypatch.setattr(tune, "Problem", Problem)
    monkeypatch.setattr(tune, "search", lambda problem, seconds, report: outcome)
    from tilework import _triton

    monkeypatch.setattr(_triton, "architecture", lambda device: "sm_90")
    arguments = ("tune", "linear_cross_entropy.backward", "--size", "N=64", "--size", "D=32")
    result = run(*arguments)
    assert result.exit_code == 0
    assert 'BACKWARD: "sm_90": Config(block_rows=1, block_columns=2, ' in result.stdout
    assert "9 entries tried, 1 skipped: the time is over." in result.stdout
    assert "1 ms; the entry in the table 2 ms" in result.stdout
    ((case, dtype),) = problems
    assert case.kind == "forward+backward"
    assert (case.sizes["N"], case.sizes["D"]) == (64, 32)
    assert dtype == torch.bfloat16
    for wrong in ("Q=3", "N=x", "N", "N=0"):
        result = run(*arguments, "--size", wrong)
        assert result.exit_code == 2
        assert "must be one of N=NUMBER, D=NUMBER" in " ".join(result.stderr.split())
    outcome.best = None
    assert run(*arguments).exit_code == 1


@pytest.mark.untyped
def test_a_real_interrupt_leaves_valid_rows(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    code = """if True:
        from bench import tiny_suite
        from tilework.bench import suites
        from tilework.bench.cli import app
        suites.discover = lambda: {"tiny_suite": tiny_suite.SUITE}
        app()
    """
    options = ("bench", "--seconds", "2", "--no-memory", "--device", "cpu", "--filter", "000")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert b"Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert {row.case for row in results.read(out)} == {"square n=1000"}
