import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_library_works_where_jaxtyping_is_not_installed() -> None:
    """A GPU machine without a network may lack it; ``make gpu`` then adds what stands in for it."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(REPOSITORY / "benchmarks" / "stand_ins")!r})
        import jaxtyping
        assert "stand_ins" in jaxtyping.__file__
        import torch
        from tilework import attention, catalog, decoding, losses, norms
        assert catalog.entries()
        losses.linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))
        try:
            jaxtyping.jaxtyped
        except AttributeError:
            print("ok")
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "ok\n", result.stderr
