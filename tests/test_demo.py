import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

DEMO = Path(__file__).parent.parent / "examples/demo"
QUICK = ("--quick", "--steps", "100")
# One thread, as the models are tiny and other tests run at the same time.
ENVIRONMENT = {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
VARIANTS = ("tilework", "torch")

# Some seconds each: a process imports torch and trains two small models.
pytestmark = pytest.mark.untyped


def start(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """The demo in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, DEMO, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT | environment,
        cwd=cwd,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=120)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def run(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    return finish(start(*arguments, **environment))


def checkpoint(out: Path, variant: str) -> dict[str, Any]:
    return torch.load(out / f"{variant}.pt", weights_only=True)


def assert_equal(one: Any, other: Any) -> None:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run without an interruption."""
    out = tmp_path_factory.mktemp("demo")
    code, output = run(*QUICK, "--out", out)
    assert code == 0, output
    return out, output


def test_shows_the_table_and_writes_its_files(finished: tuple[Path, str]) -> None:
    out, output = finished
    rows = [line for line in output.splitlines() if line.startswith("│ t")]
    assert [row.split()[1] for row in rows] == list(VARIANTS)
    for row, variant in zip(rows, VARIANTS, strict=True):
        bits, step, rate, memory, parameters = (
            float(cell.replace(",", "")) for cell in row.split("│")[2:-1]
        )
        state = checkpoint(out, variant)
        assert bits == round(state["validation"][-1][1], 5)
        assert bits < 6, "a model that has learned nothing needs 8 bits"
        assert rate == pytest.approx(8 * 64 / step * 1000, rel=0.02)
        assert 0 < memory < 1000
        assert parameters == sum(weight.numel() for weight in state["model"].values())
        assert len(state["losses"]) == 100
        assert [step for step, _ in state["validation"]] == list(range(5, 101, 5))
    assert "Validation losses agree" in output
    shown = re.findall(r"^(\w+): (\d+)/100 steps, [\d.]+ bits per byte", output, re.MULTILINE)
    assert shown == [(name, str(step)) for name in VARIANTS for step in range(5, 101, 5)]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text().startswith("def ")
    assert not list(out.glob("*.tmp"))


def test_the_models_start_equal_and_are_made_of_different_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(DEMO)
    from model import GPT, PARTS

    models = []
    for variant in VARIANTS:
        torch.manual_seed(0)
        models.append(GPT(16, 2, 2, 8, PARTS[variant]))
    one, other = models
    assert_equal(dict(one.state_dict()), dict(other.state_dict()))
    modules = [{type(module) for module in model.modules()} for model in models]
    assert {cls.__module__.partition(".")[0] for cls in modules[0] - modules[1]} == {"tilework"}
    assert {cls.__module__ for cls in modules[1] - modules[0]} == {"model"}


def test_goes_on_after_ctrl_c_as_if_nothing_had_been(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    process = start(*QUICK, "--out", tmp_path)
    while not (tmp_path / "tilework.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    assert 0 < len(checkpoint(tmp_path, "tilework")["losses"]) < 100
    assert not (tmp_path / "torch.pt").exists()

    code, output = run(*QUICK, "--out", tmp_path, "--resume")
    assert code == 0, output
    for variant in VARIANTS:
        resumed, whole = checkpoint(tmp_path, variant), checkpoint(finished[0], variant)
        for measured in ("seconds", "peak"):
            assert resumed.pop(measured)
            del whole[measured]
        assert_equal(resumed, whole)
    assert (tmp_path / "sample.txt").read_text() == (finished[0] / "sample.txt").read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_process_ends_with_its_parent(sent: signal.Signals, tmp_path: Path) -> None:
    process = start("--quick", "--steps", "1000000", "--out", tmp_path)
    # The line comes from the child, while it trains.
    assert process.stdout is not None
    assert "5/1000000" in process.stdout.readline()
    process.send_signal(sent)
    _, output = finish(process)  # which waits for whoever holds the pipe
    assert "Traceback" not in output
    assert ("Stopped. To go on" in output) == (sent == signal.SIGTERM)


def test_a_quick_run_leaves_the_files_of_a_full_one_alone(tmp_path: Path) -> None:
    kept = tmp_path / "runs/demo/tilework.pt"
    kept.parent.mkdir(parents=True)
    kept.write_text("of a full run")
    process = start("--quick", "--steps", "5", cwd=tmp_path)
    code, output = finish(process)
    assert code == 0, output
    assert kept.read_text() == "of a full run"
    assert len(checkpoint(tmp_path / "runs/demo-quick", "torch")["losses"]) == 5


def test_help_says_how_many_threads_there_are() -> None:
    _, output = run("--help")
    assert re.search(r"--threads.*\[default: 1\]", output, re.DOTALL)


def test_a_wrong_loss_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from tilework.losses import LinearCrossEntropy\n"
        "right = LinearCrossEntropy.forward\n"
        "LinearCrossEntropy.forward = lambda *args, **options: 1.001 * right(*args, **options)\n"
    )
    code, output = run("--quick", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert code == 1, output
    assert "Validation losses DISAGREE" in output


def test_bad_options_are_named_in_one_line(finished: tuple[Path, str], tmp_path: Path) -> None:
    cases = [
        (("--device", "tpu"), "--device must be cpu or cuda, got tpu"),
        (("--device", "cuda"), "no CUDA device"),
        (("--resume", "--out", tmp_path), f"no checkpoint in {tmp_path}"),
        (("--resume", "--quick", "--out", finished[0]), "was trained with steps 100, not 30"),
    ]
    processes = [start(*arguments) for arguments, _ in cases]
    for process, (_, message) in zip(processes, cases, strict=True):
        code, output = finish(process)
        assert code == 2
        assert message in output
        assert output.startswith("demo: ")
        assert output.count("\n") == 1
