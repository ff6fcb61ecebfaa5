import os
import sys
from collections.abc import Generator, Iterator

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores; read when torch is imported

import hypothesis
import pytest
import torch

from helpers import SEED, Inexact, assert_exact_over_draws

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported


hypothesis.settings.register_profile("tilework", database=None, deadline=None)
hypothesis.settings.load_profile("tilework")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(SEED)  # as from the command line; 0 would count as none


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Refuse files that draw when they are imported, before the seed is set."""
    before = torch.get_rng_state()
    report = yield
    if not torch.equal(torch.get_rng_state(), before):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} draws random numbers when it is imported"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "triton" in item.nodeid:
            item.add_marker(pytest.mark.untyped)
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Judge a test over several draws where its own exceeds the error rule."""
    try:
        return (yield)
    except Inexact:
        if getattr(pyfuncitem.obj, "is_hypothesis_test", False):
            raise
        assert_exact_over_draws(pyfuncitem.runtest)
        return True


@pytest.fixture(autouse=True)
def deterministic_and_poisoned() -> Iterator[None]:
    """Refuse operations that are not deterministic, and fill ``torch.empty`` with nan."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # variants of one function count towards a limit
