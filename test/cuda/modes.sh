#!/bin/sh
# modes.sh DIRECTORY [all]: the op tests there in several modes of the emulated GPU. All must pass,
# and with the same hash over everything that was computed. `all`: every mode that cuda_on_cpu.h has.
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0 first=
mode() {
    CUDA_EMULATOR=$1 "$directory/test_ops" >"$directory/log" 2>&1
    status=$?
    hash=$(grep '^hash ' "$directory/log")
    [ -n "$first" ] || first=$hash
    if [ $status = 0 ] && [ "$hash" = "$first" ]; then
        passed=$((passed + 1))
        echo "ok       ops, ${1:-ascending}: $hash"
    else
        failed=$((failed + 1))
        grep -v '^ok' "$directory/log" | tail -n 20
        echo "FAILED   ops, ${1:-ascending}: $hash, the first $first"
    fi
}
directory=$1
mode ""
mode "schedule=random blocks=random seed=1 lazy"
mode "schedule=warp seed=2 protect"
if [ "$2" = all ]; then
    mode "schedule=descending blocks=descending"
    mode "lazy protect"
    for seed in 0 3 4 5 6 7 8 9; do mode "schedule=random blocks=random seed=$seed"; done
fi
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
