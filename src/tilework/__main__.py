"""``python -m tilework``, for the console script ``tilework``."""

from tilework.bench.__main__ import main

if __name__ == "__main__":
    main()
