#!/usr/bin/env bash
# Checks every kernel on this machine's GPU, then measures, within 8 minutes. Run again, it goes on
# where it stopped. Needs no network and no installation: PYTHON has torch, Triton, numpy, pytest,
# hypothesis, rich, typer and matplotlib. All results are in the folder OUT.
set -u
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${OUT:=runs/gpu}"
CHECKS=180   # seconds for the checks
BENCH=240    # and for the measurements, which begin nothing new in the last part of it
mkdir -p "$OUT" || exit 2

export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import jaxtyping' 2> /dev/null || PYTHONPATH+=":$PWD/benchmarks/stand_ins"
tilework() { "$PYTHON" -m tilework.bench "$@"; }

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo 'make gpu: torch finds no GPU; `tilework doctor` says more' >&2
    exit 2
}
tilework doctor --all > "$OUT/doctor.txt"

timeout --kill-after=5 "$CHECKS" "$PYTHON" -m pytest tests -m gpu -q 2>&1 | tee "$OUT/checks.txt"
checks=${PIPESTATUS[0]}

until=$((SECONDS + BENCH))
status=3
while [ "$status" -eq 3 ] && [ $((until - SECONDS)) -gt 30 ]; do  # 3: the GPU needs a new process
    left=$((until - SECONDS))
    minutes=$("$PYTHON" -c "print(($left - 20) / 60)")
    timeout --kill-after=5 "$left" "$PYTHON" -m tilework.bench bench --device cuda --seconds 2 \
        --minutes "$minutes" --resume --out "$OUT/results.jsonl" 2>&1 | tee -a "$OUT/bench.txt"
    status=${PIPESTATUS[0]}
done

tilework table "$OUT/results.jsonl" > "$OUT/summary.md" && cat "$OUT/summary.md"
tilework plot "$OUT/results.jsonl" --out "$OUT/plots" > "$OUT/plots.txt"
[ "$checks" -eq 0 ] || echo "make gpu: the checks ended with $checks, see $OUT/checks.txt" >&2
[ "$status" -eq 0 ] || echo "make gpu: the measurements ended with $status" >&2
[ "$checks" -eq 0 ] && [ "$status" -eq 0 ]
