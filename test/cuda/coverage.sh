#!/bin/sh
# coverage.sh: builds the op tests with gcov and lists the lines of qlora.cu that nothing reached.
# None is allowed in a kernel or a device function; of host code, which is mostly what happens when
# CUDA fails, they are only counted.
cd "$(dirname "$0")/../.." || exit 1
E=build/emulated-gcov
make -s CUDA=0 E=$E SANITIZE="-O0 --coverage" OPT=-O0 $E/test_ops || exit 1
$E/test_ops | tail -n 1
cp qlora.cu $E/                  # where gcov looks for it
(cd $E && gcov -o . test_ops-test_ops.gcda >gcov.log 2>&1)
[ "$(wc -l <$E/qlora.cu.gcov)" -gt 3000 ] || { echo "gcov found nothing"; exit 1; }
# A line of a template is listed once for all its instances and once for each; one that ran is enough.
awk -F: '
    $2 + 0 > 0 {
        line = $2 + 0
        count = $1
        gsub(/ /, "", count)
        text[line] = substr($0, index($0, $3))
        if (count ~ /^[0-9]/) reached[line] = 1
        else if (count ~ /^[#=]/) missed[line] = 1
    }
    END {
        for (line = 1; line in text; line++) {
            if (text[line] ~ /__global__|__device__/) device = 1
            else if (text[line] ~ /^(static|int|void|extern)/) device = 0
            if (!missed[line] || reached[line]) continue
            if (!device) { host++; continue }
            bad++
            printf "  not reached: qlora.cu:%d:%s\n", line, text[line]
        }
        printf "%d lines of kernels and %d lines of host code not reached\n", bad, host
        printf "%d passed, %d failed, 0 skipped\n", !bad, !!bad
        exit bad > 0
    }' $E/qlora.cu.gcov
