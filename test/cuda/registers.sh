#!/bin/sh
# registers.sh: compiles qlora.cu for every generation with warnings as errors and lists the kernels
# that spill registers to memory. A few bytes of these are known:
#   sm_86, sm_89  attention_forward_tiles<128>       its sums fill the registers; other tile sizes
#   sm_120        attention_backward_queries<128>    spill more or read K and V more often
#   sm_120        next_token_block                   once a token, one block: of no account
cd "$(dirname "$0")/../.." || exit 1
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
mkdir -p build
passed=0 failed=0
for arch in 75 80 86 89 90 120; do
    $nvcc --list-gpu-arch | grep -qx "compute_$arch" || continue
    if ! $nvcc -std=c++17 -O3 -arch=sm_$arch -Xptxas -v --Werror all-warnings \
        -Xcompiler=-Wall,-Wextra,-Werror -c -o build/registers.o qlora.cu >build/registers.log 2>&1
    then
        grep -v '^ptxas info' build/registers.log | head -n 20
        echo "FAILED   sm_$arch does not compile"
        failed=$((failed + 1))
        continue
    fi
    awk -v arch=$arch '
        /Compiling entry function/ { kernel = $0; sub(/.*function .[^0-9]*/, "", kernel)
                                     sub(/. for .*/, "", kernel) }
        /bytes spill stores/ { spill = $0; sub(/.*frame, /, "", spill); sub(/ bytes spill stores.*/, "", spill)
                               if (spill > 0) print kernel, spill }
        /Used [0-9]+ registers/ { used = $0; sub(/.*Used /, "", used); sub(/ registers.*/, "", used)
                                  n++; if (used + 0 > most) most = used + 0 }
        END { print "kernels", n, "most registers", most > "build/registers.sum" }' \
        build/registers.log >build/spills
    case $arch in
    86 | 89) known='attention_forward_tiles.*128' ;;
    120) known='attention_backward_queries.*128\|next_token_block' ;;
    *) known=none ;;
    esac
    new=$(grep -v "$known" build/spills)
    if [ -z "$new" ]; then passed=$((passed + 1)); echo "ok       sm_$arch: $(cat build/registers.sum), $(wc -l <build/spills) known spills"
    else failed=$((failed + 1)); echo "FAILED   sm_$arch spills:"; echo "$new"; fi
done
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
