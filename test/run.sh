#!/bin/sh
# Runs all tests and adds up their last lines. Called by `make test`; $E is where the programs with
# the emulated GPU lie.
cd "$(dirname "$0")/.." || exit 1
passed=0 failed=0 skipped=0 status=0
programs="build/test64:build/test:sh test/cli.sh"
if [ -n "$CXX" ]; then
    ${MAKE:-make} -s build/vendor_cpp || exit 1
    programs="$programs:$E/selftest:sh test/cuda/modes.sh $E:$E/test_gpu"
else
    rm -f build/vendor_cpp
    echo "  skipped: qlora.cu on the CPU (no C++ compiler here)"
    skipped=1
fi
IFS=:
for program in $programs; do
    echo "== $program"
    IFS=' '
    $program >build/log 2>&1 || status=1
    cat build/log
    line=$(tail -n 1 build/log)
    case $line in
    *" passed, "*" failed, "*" skipped") ;;
    *)  echo "  FAILED $program ended without a count"
        line="0 passed, 1 failed, 0 skipped" ;;
    esac
    set -- $line
    passed=$((passed + $1)) failed=$((failed + $3)) skipped=$((skipped + $5))
done
rm -rf build/adapter-* build/quantized-*
echo "$passed passed, $failed failed, $skipped skipped"
[ $status = 0 ] && [ $failed = 0 ]
