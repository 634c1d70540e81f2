#!/bin/sh
# Runs all tests and adds up their last lines. Called by `make test`.
cd "$(dirname "$0")/.." || exit 1
CXX=${CXX:-c++}
if command -v "$CXX" >/dev/null 2>&1; then
    ${MAKE:-make} -s build/vendor_cpp || exit 1
else
    rm -f build/vendor_cpp
fi
passed=0 failed=0 skipped=0 status=0
for program in build/test64 build/test "sh test/cli.sh"; do
    echo "== $program"
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
