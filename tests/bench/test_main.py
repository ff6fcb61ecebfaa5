import subprocess
import sys

import pytest

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
from importlib import util
find_spec = util.find_spec
util.find_spec = lambda name, *rest: None if name in {blocked} else find_spec(name, *rest)
from tilework.bench.__main__ import main
sys.argv = ["tilework", *{arguments}]
main()
"""


def run(blocked: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKER.format(blocked=blocked, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("blocked", "named"), [(("typer",), "typer"), (("typer", "rich"), "typer and rich")]
)
def test_a_missing_command_line_package_is_one_clear_line(
    blocked: tuple[str, ...], named: str
) -> None:
    result = run(blocked, "list")
    assert result.returncode == 2
    assert result.stderr == (
        f"tilework: the command line needs {named}: pip install 'tilework[bench]'\n"
    )
    assert result.stdout == ""


def test_plot_without_matplotlib_says_what_to_install(tmp_path) -> None:
    from bench.test_results import ROW

    file = tmp_path / "r.jsonl"
    file.write_text(ROW.to_json() + "\n")
    result = run(("matplotlib",), "plot", str(file))
    assert result.returncode == 2
    assert "needs matplotlib: pip install 'tilework[bench]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_triton_and_optional_packages_doctor_works() -> None:
    result = run(("triton", "matplotlib", "psutil", "cut_cross_entropy"), "doctor", "--all")
    assert result.returncode == 0
    assert "the package triton is not installed" in result.stdout.replace("\n", " ") or (
        "it runs on cuda" in result.stdout
    )
    assert "Triton is not installed" in result.stdout


def test_the_module_runs_and_the_library_does_not_import_it() -> None:
    code = "import sys, tilework.losses; sys.exit('tilework.bench' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for module in ("tilework", "tilework.bench"):
        result = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True
        )
        assert result.returncode == 0
        for command in ("list", "show", "doctor", "bench", "plot", "table", "page", "tune"):
            assert command in result.stdout


def test_help_costs_little_more_than_torch() -> None:
    """0.5 s, in time of this process, since machines are busy."""
    code = """if True:
        import sys, time
        import torch
        start = time.process_time()
        from tilework.bench.__main__ import main
        sys.argv = ["tilework", "--help"]
        try:
            main()
        except SystemExit:
            pass
        spent = time.process_time() - start
        heavy = {"torch._dynamo", "triton", "matplotlib", "tilework.losses"} & set(sys.modules)
        assert not heavy, heavy
        print(spent)
    """
    output = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert min(float(one.stdout.split()[-1]) for one in output) < 0.5
