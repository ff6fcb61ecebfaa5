#!/usr/bin/env bash
# Mutation testing of one source file, in a copy of the tree: prints the mutants that survive.
#     make mutants FILE=src/tilework/decoding/typical_p.py [TESTS='tests/decoding/test_typical_p.py']
set -euo pipefail
file=${1:?make mutants FILE=src/tilework/... [TESTS=...]}
[ -f "$file" ] || { echo "no such file: $file" >&2; exit 2; }

# tests/ mirrors src/tilework/: a folder of tests for a folder, test_NAME.py for NAME.py.
mirror=tests/${file#src/tilework/}
folder=$(dirname "$mirror")
tests=${2:-}
if [ -z "$tests" ]; then
    tests=$folder/test_$(basename "$file")
    [ -f "$tests" ] || tests=$folder/test_$(basename "$folder").py
    [ -f "$tests" ] || tests=$(dirname "$folder")/test_$(basename "$folder").py
    [ -f "$tests" ] || tests=$folder
fi

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r src tests pyproject.toml "$copy"
cd "$copy"
export PYTHONPATH=$copy/src PYTHONDONTWRITEBYTECODE=1
run="$BIN/python -m pytest -x -q -p no:cacheprovider $tests"
echo "tests: $tests"
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
