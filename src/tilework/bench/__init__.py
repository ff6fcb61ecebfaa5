"""The benchmark suites and the command line ``tilework``; needs the extra ``tilework[bench]``.

Nothing else in the library imports this package.
"""
