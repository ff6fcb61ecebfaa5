"""Every source file has tests of its own or shared ones, which mutation testing runs."""

import os
from pathlib import Path

import pytest

import mirror

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("losses/classification/squentropy.py", "losses/classification/test_squentropy.py"),
        ("losses/linear_log_probs.py", "losses/test_linear_log_probs.py"),
        ("attention/block_sparse/tiled.py", "attention/block_sparse"),
        ("norms/_row_norm/__init__.py", "norms/_row_norm"),
        ("bench/suites/norms.py", "bench/suites/test_norms.py"),
        ("catalog.py", "test_catalog.py"),
        ("_checks.py", "test_checks.py"),
        ("losses/_classes/class_index.py", "losses/_classes/test_class_index.py"),
    ],
)
def test_a_file_has_tests_of_its_own(file: str, tests: str) -> None:
    assert mirror.own(Path("src/tilework", file)) == Path("tests", tests)


def test_a_private_room_has_the_tests_of_what_stands_on_it() -> None:
    found = mirror.above(Path("src/tilework/losses/_classes/linear/triton/statistics.py"))
    assert "tests/losses/linear_cross_entropy" in found
    assert all(Path(one.partition("::")[0]).exists() for one in found)
    assert mirror.above(Path("src/tilework/catalog.py")) == []


@pytest.mark.untyped
def test_a_file_has_the_shared_tests_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("src", os.environ.get("PYTHONPATH", ""))))
    found = mirror.shared(Path("src/tilework/losses/classification/squentropy.py"))
    assert any("test_every_loss.py::test_equals_its_definition[squentropy" in one for one in found)
    assert any("test_every_linear_form.py" in one and "linear_squentropy" in one for one in found)
    assert not any("number_token" in one for one in found)
    assert mirror.shared(Path("src/tilework/catalog.py")) == []
    of_kernels = mirror.shared(Path("src/tilework/norms/rms_norm.py"))
    files = {one.partition("::")[0] for one in of_kernels}
    assert files == {"tests/test_every_kernel.py", "tests/test_catalog.py"}
