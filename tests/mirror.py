"""Which tests a source file has: those of its own, and the shared ones of what it registers.

``python tests/mirror.py src/tilework/...`` prints them, a line for each argument of pytest.
"""

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path("tests")
CATALOG = "tests/test_catalog.py"
STAND_ON = {
    Path("src/tilework/losses/_classes/linear"): (
        "tests/losses/linear_cross_entropy",
        "tests/losses/test_linear_log_probs.py",
        "tests/losses/test_every_linear_form.py",
        "tests/test_wrapped.py::test_operations_of_linear_heads",
    ),
    Path("src/tilework/losses/_classes/logits"): ("tests/losses/test_every_loss.py",),
    Path("src/tilework/optim/_optimizer"): (
        "tests/optim/test_every_optimizer.py",
        "tests/optim/test_step_in_backward.py",
        "tests/optim/optimizers/test_adamw.py",
    ),
}
"""The tests of public functions that stand on a private folder, whose numbers they check."""


def own(file: Path) -> Path:
    """A folder of tests for a folder, ``test_NAME.py`` for ``NAME.py``, from the root."""
    folder = TESTS / file.parent.relative_to("src/tilework")
    names = (
        folder / f"test_{file.name.lstrip('_')}",
        folder / f"test_{folder.name}.py",
        folder.parent / f"test_{folder.name}.py",
    )
    return next((name for name in names if name.exists()), folder)


def shared(file: Path) -> list[str]:
    """The tests of whole kinds that run on the public functions and classes of the file."""
    defined = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", file.read_text(), re.MULTILINE)
    tables = sorted(
        str(path)
        for folder in own(file).parents
        if folder != TESTS.parent
        for path in folder.glob("test_every_*.py")
    )
    if not defined:
        return []
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", CATALOG, *tables],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Samples of one name are numbered; entries of the catalogue have whole names.
    sample = re.compile(rf"::.*[\[.-](?:{'|'.join(defined)})\d*[\]-]")
    return [line for line in collected.splitlines() if sample.search(line)]


def above(file: Path) -> list[str]:
    """The tests of what stands on the file's folder."""
    return [tests for folder in file.parents for tests in STAND_ON.get(folder, ())]


if __name__ == "__main__":
    file = Path(sys.argv[1])
    print(own(file), *shared(file), *above(file), sep="\n")
