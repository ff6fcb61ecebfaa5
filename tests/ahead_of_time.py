"""Compile kernels for GPUs that this machine does not have, through their own launchers.

``compiled(path)`` imports the Python file ``path`` in a process without Triton's interpreter, calls
each function in its list ``LAUNCHES`` once per architecture on CPU tensors, compiles what it
launches instead of running it, and returns what the compilers say about each kernel.
That takes some seconds where Triton's cache is empty.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Shared memory that one program may take, in bytes.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MATRIX_INSTRUCTION = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "gfx942": r"v_mfma",
}


WIDE_LOAD = r"ld\.global\S*\.(?:v4\.\w32|v2\.\w64)|global_load_dwordx4"
"""Of 16 bytes by each thread."""


def compiled(path: str | Path) -> list[dict[str, Any]]:
    """Reports of all kernels that the launches in a file lead to, on every architecture."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


class _Driver:
    """Stands in for the driver of a GPU; each architecture is a device of its own."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.arch.startswith("gfx"):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)


@contextmanager
def compiling(arch: str, report: Callable[[str, Any], None]) -> Iterator[None]:
    """Compile launches for an architecture instead of running them."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from tilework import _triton

    run, architecture = JITFunction.run, _triton.architecture

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        report(kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **options))

    driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    JITFunction.run = compile_only
    _triton.architecture = lambda device: arch
    try:
        yield
    finally:
        JITFunction.run = run
        _triton.architecture = architecture


def resources(arch: str, kernel: Any) -> dict[str, Any]:
    """What the compiler reports: registers, spilled bytes, shared memory, matrix instructions."""
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        numbers = {name: int(value) for name, value in re.findall(r"\.(\w+_count): +(\d+)", text)}
        stack = int(re.search(r"\.private_segment_fixed_size: +(\d+)", text)[1])  # type: ignore[index]
        return {
            "registers": numbers["vgpr_count"],
            "spilled": stack + numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
            "shared": kernel.metadata.shared,
            "matrix": len(re.findall(MATRIX_INSTRUCTION[arch], text)),
            "matrix of sm_80": 0,
            "wide loads": len(re.findall(WIDE_LOAD, text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "shared": kernel.metadata.shared,
        "matrix": len(re.findall(MATRIX_INSTRUCTION[arch], kernel.asm["ptx"])),
        "matrix of sm_80": len(re.findall(MATRIX_INSTRUCTION["sm_80"], kernel.asm["ptx"])),
        "wide loads": len(re.findall(WIDE_LOAD, kernel.asm["ptx"])),
    }


def label(launch: Callable[[], None]) -> str:
    """The name of a launch, of a ``partial`` that was given none that of its function's call."""
    if isinstance(launch, functools.partial) and "__name__" not in vars(launch):
        named = (f"{name}={value!r}" for name, value in launch.keywords.items())
        return f"{launch.func.__name__}({', '.join([*map(repr, launch.args), *named])})"
    return launch.__name__


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("launches", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for arch in SHARED_MEMORY:
        for launch in module.LAUNCHES:

            def report(
                name: str, kernel: Any, arch: str = arch, label: str = label(launch)
            ) -> None:
                facts = resources(arch, kernel)
                print(json.dumps({"arch": arch, "launch": label, "kernel": name, **facts}))

            with compiling(arch, report):
                launch()


if __name__ == "__main__":
    main(sys.argv[1])
