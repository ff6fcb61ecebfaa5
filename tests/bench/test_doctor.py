import importlib.util
import io

import pytest
import torch
from rich.console import Console

from tilework import catalog
from tilework._implementations import TABLES, Implementation
from tilework.bench import doctor


def text(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=220)
    console.print(renderable)
    return console.file.getvalue()


def entry(name: str = "kernel", **options: object) -> Implementation:
    defaults = {
        "dtypes": (torch.float32,),
        "memory": "little",
    }
    return Implementation(name, **(defaults | options))


@pytest.mark.parametrize(
    ("devices", "checked", "shown"),
    [
        (("cuda",), "Triton's interpreter", "Triton's interpreter, not yet on a GPU"),
        (("cuda",), "", "not yet on a GPU"),
        (("cuda",), "NVIDIA H200", "NVIDIA H200"),
        (("cuda", "cpu"), "CPU", "CPU"),
        ((), "CPU", "CPU"),
        ((), "", "nothing yet"),
    ],
)
def test_kernels_that_never_ran_on_a_gpu_say_so(
    devices: tuple[str, ...], checked: str, shown: str
) -> None:
    assert doctor.checked_on(entry(devices=devices, checked_on=checked)) == shown


def test_reasons_why_an_implementation_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cpu")])
    assert doctor.unusable(entry()) is None
    assert doctor.unusable(entry(devices=("cuda",))) == "it runs on cuda, this machine has cpu"
    assert "no_such_module" in str(doctor.unusable(entry(needs="no_such_module")))


def test_the_default_is_the_first_that_takes_some_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        entry("gpu", devices=("cuda",)),
        entry("half", dtypes=(torch.bfloat16,)),
        entry("plain"),
        entry("last"),
    )
    monkeypatch.setitem(TABLES, "family.thing", table)
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cpu")])
    lines = [
        line for line in text(doctor.implementations("family.thing")).splitlines() if "│" in line
    ]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert [(row[0], row[2]) for row in rows] == [
        ("gpu", ""),
        ("half", "cpu"),
        ("plain", "cpu"),
        ("last", ""),
    ]


def test_the_report_of_everything_covers_every_operator_and_package() -> None:
    shown = text(doctor.report(everything=True))
    for table in TABLES:
        assert table in shown
    assert torch.__version__ in shown
    assert "cut-cross-entropy" in shown
    assert torch.backends.cpu.get_cpu_capability() in shown


def test_the_report_begins_with_what_is_wrong_and_has_no_long_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "find_problems", lambda: [doctor.Problem("It burns.", "Run.")])
    for everything in (False, True):
        shown = text(doctor.report(everything=everything))
        assert shown.startswith("It burns.\n    Run.\n")
        assert shown.count("It burns.") == 1
    short = text(doctor.report())
    assert len(short.splitlines()) < 40
    assert "tilework doctor --all" in short
    monkeypatch.setattr(doctor, "find_problems", lambda: [])
    assert text(doctor.report()).startswith("No problems found.")


def test_the_report_tells_what_is_used_and_marks_kernels_that_no_gpu_has_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = [torch.device("cpu"), torch.device("cuda", 0)]
    monkeypatch.setattr(doctor, "devices", lambda: here)
    monkeypatch.setattr(
        doctor,
        "_is_default",
        lambda entries, one, device: (
            (one.name == "tiled") == (device.type == "cpu") and one.name in ("tiled", "triton")
        ),
    )
    line = next(
        line
        for line in text(doctor.defaults()).splitlines()
        if "attention.block_sparse_decode" in line
    )
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == [
        "attention.block_sparse_decode and 1 more",
        "tiled",
        "triton (not yet checked on a GPU)",
    ]


def problems() -> str:
    return "\n".join(f"{problem.what} {problem.hint}" for problem in doctor.find_problems())


def test_problems_have_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("no module named nothing")

    monkeypatch.setattr(catalog, "entries", fail)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = problems()
    for word in (
        "no module named nothing",
        "Triton is not",
        "No GPU",
        "INTERPRET",
        "C++",
        "bfloat16",
    ):
        assert word in found


def test_old_packages_and_those_that_do_not_belong_together_are_problems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"torch": "2.10.1+cpu", "triton": "3.10.0"}
    monkeypatch.setattr(doctor.results, "version", versions.get)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["triton==3.7.1; linux", "sympy"])
    found = problems()
    assert "torch 2.10.1+cpu is older than 2.11" in found
    assert "triton 3.10.0 is older" not in found
    assert "Triton 3.10.0 is not the release" in found
    assert "pip install triton==3.7.1" in found
    monkeypatch.setattr(doctor.results, "version", {"torch": "2.13.0", "triton": "3.7.1"}.get)
    assert "older" not in problems()
    assert "release" not in problems()


@pytest.mark.parametrize(("capability", "old"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_a_gpu_older_than_the_kernels_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], old: bool
) -> None:
    here = [torch.device("cpu"), torch.device("cuda", 0)]
    monkeypatch.setattr(doctor, "devices", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert ("cuda:0 is older than sm_80" in problems()) == old


def test_tables_say_where_size_decides() -> None:
    shown = " ".join(text(doctor.implementations("norms.rms_norm")).split())
    assert "tiled: on a CPU, RMS normalization from 2097152 elements" in shown
    shown = " ".join(text(doctor.implementations("attention.block_sparse_attention")).split())
    assert "triton: blocks of 16, 32, 64 or 128, up to 256 features" in shown


def test_what_a_rule_decides_is_no_less_a_default() -> None:
    for name in ("chunked", "tiled"):
        table = text(doctor.implementations("losses.linear_cross_entropy"))
        (row,) = (line for line in table.splitlines() if f"│ {name} " in line)
        assert "cpu" in row.split("│")[3]


def test_packages_that_pip_alone_does_not_install_have_another_hint() -> None:
    shown = " ".join(text(doctor.packages()).split())
    if importlib.util.find_spec("quack") is None:
        assert "pip install 'tilework[peers-gpu]'" in shown


def test_a_healthy_machine_has_no_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert problems() == ""
