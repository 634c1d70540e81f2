#!/bin/sh
# each.sh PROGRAM: every test of an op test program in a process of its own. ThreadSanitizer keeps a
# history of all memory ever touched, so that all tests together would not fit.
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0
for name in $("$1" --list | cut -d' ' -f1); do
    if "$1" "$name" >build/each.log 2>&1; then
        passed=$((passed + 1))
        echo "ok       $name"
    else
        failed=$((failed + 1))
        head -n 60 build/each.log
        echo "FAILED   $name"
    fi
done
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
