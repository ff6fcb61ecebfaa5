"""The console script ``tilework``, also ``python -m tilework.bench``."""

import importlib.util
import sys

COMMAND_LINE = ("typer", "rich")


def main() -> None:
    """Run the command line, or say what to install when its packages are missing."""
    missing = [name for name in COMMAND_LINE if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"tilework: the command line needs {' and '.join(missing)}: "
            "pip install 'tilework[bench]'",
            file=sys.stderr,
        )
        sys.exit(2)

    from tilework.bench.cli import app

    app()


if __name__ == "__main__":
    main()
