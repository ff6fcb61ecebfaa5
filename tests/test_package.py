"""The package as a whole: what importing it costs and needs."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tilework


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_is_cheap_and_silent() -> None:
    # Some seconds: a process imports torch, three times, as one time is a matter of luck.
    code = """if True:
        import sys, time, torch
        start = time.perf_counter()
        import tilework
        print(time.perf_counter() - start)
        heavy = {"triton", "jaxtyping", "rich", "typer", "tilework.losses"} & set(sys.modules)
        assert not heavy, heavy
    """
    seconds = [float(run(code)) for _ in range(3)]  # one number: nothing else was printed
    assert min(seconds) < 0.1


def test_families_need_neither_triton_nor_optional_packages() -> None:
    run("""if True:
        import sys
        absent = ("triton", "typer", "rich", "matplotlib", "psutil", "beartype", "transformers")
        sys.modules.update(dict.fromkeys(absent))
        import torch, tilework
        from tilework import catalog
        assert catalog.entries()
        loss = tilework.losses.linear_cross_entropy
        loss(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))
    """)


def test_families_are_cheap_to_import() -> None:
    """At most 0.15 s each where torch takes 0.85 s; the best of three."""
    code = """if True:
        import gc, importlib, sys, time
        gc.disable()  # a full collection takes 0.04 s and comes in whichever family happens to
        start = time.process_time()
        import torch, jaxtyping
        import tilework
        whole = time.process_time() - start
        for family in tilework.FAMILIES:
            start = time.process_time()
            importlib.import_module(f"tilework.{family}")
            print((time.process_time() - start) / whole)
        assert "torch._dynamo" not in sys.modules, "the compiler, which takes seconds"
    """
    runs = [map(float, run(code).split()) for _ in range(3)]
    best = [min(parts) for parts in zip(*runs, strict=True)]
    assert len(best) == len(tilework.FAMILIES)
    assert max(best) < 0.15 / 0.85


def test_families_do_not_import_triton() -> None:
    run("""if True:
        import sys
        from tilework import catalog
        catalog.entries()
        loaded = [name for name in sys.modules if name.startswith("tilework")]
        assert not [name for name in loaded if "triton" in name]
    """)


def test_families_load_lazily() -> None:
    for family in tilework.FAMILIES:
        assert getattr(tilework, family) is importlib.import_module(f"tilework.{family}")
        assert family in dir(tilework)
    with pytest.raises(AttributeError, match="no_such_family"):
        tilework.no_such_family  # noqa: B018


def test_families_import_each_other_only_by_public_names() -> None:
    root = Path(tilework.__file__).parent
    for path in root.rglob("*.py"):
        family = path.relative_to(root).parts[0]
        if family not in tilework.FAMILIES:
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("tilework."):
                parts = words[1].split(".")
                inside = parts[1] == family or parts[1] not in tilework.FAMILIES
                assert inside or len(parts) == 2, f"{path}: {line}"
                assert parts[1] not in ("bench", "integrations"), f"{path}: {line}"


def test_typed() -> None:
    assert (Path(tilework.__file__).parent / "py.typed").exists()
