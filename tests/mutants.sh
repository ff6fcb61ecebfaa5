#!/usr/bin/env bash
# Mutation testing of one source file, in a copy of the tree: prints the mutants that survive.
#     make mutants FILE=src/tilework/decoding/typical_p.py [TESTS='tests/decoding/test_typical_p.py']
set -euo pipefail
file=${1:?make mutants FILE=src/tilework/... [TESTS=...]}
[ -f "$file" ] || { echo "no such file: $file" >&2; exit 2; }

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r src tests examples benchmarks docs ./*.md Makefile constraints.txt pyproject.toml "$copy"
cd "$copy"
export PYTHONPATH=$copy/src PYTHONDONTWRITEBYTECODE=1
if [ -n "${2:-}" ]; then printf '%s\n' $2; else "$BIN/python" tests/mirror.py "$file"; fi > tests.txt
run="$BIN/python -m pytest -x -q -p no:cacheprovider @tests.txt"
echo "tests: $(head -n 1 tests.txt), and $(($(wc -l < tests.txt) - 1)) more"
$run > baseline.txt || { tail -n 20 baseline.txt; echo "the tests fail without a mutant" >&2; exit 1; }

cat > cosmic.toml <<EOF
[cosmic-ray]
module-path = "$file"
timeout = 300.0
excluded-modules = []
test-command = "$run"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
# They would break annotations such as "Tensor | None" when the file is imported.
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]
EOF
PATH=$BIN:$PATH
cosmic-ray init cosmic.toml session.sqlite
cr-filter-operators session.sqlite cosmic.toml
cosmic-ray exec cosmic.toml session.sqlite
cr-report --surviving-only --show-diff session.sqlite
