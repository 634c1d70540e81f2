#!/bin/sh
# no_gpu.sh: ./qlora built with CUDA where there is no GPU computes on the CPU, says so, and refuses
# --device cuda with the reason.
cd "$(dirname "$0")/../.." || exit 1
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo "  skipped: there is a GPU here"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
make -s qlora GPU_ARCH=80 || exit 1
passed=0 failed=0
expect() {
    if printf '%s\n' "$2" | grep -q "$3"; then passed=$((passed + 1)); echo "ok       $1"
    else failed=$((failed + 1)); echo "FAILED   $1: $2"; fi
}
model=test/fixtures/models/qwen2
expect "auto computes on the CPU and says why" "$(./qlora generate $model --prompt x \
    --max-new-tokens 1 2>&1; ./qlora train $model data/riddles.jsonl --max-steps 1 --max-length 2048 \
    --output build/no_gpu --overwrite-output-dir 2>&1)" "no GPU"
expect "--device cpu" "$(./qlora train $model data/riddles.jsonl --max-steps 1 --device cpu \
    --output build/no_gpu --overwrite-output-dir 2>&1)" "the adapter is in"
expect "--device cuda is refused with the reason" \
    "$(./qlora eval $model data/riddles.jsonl --device cuda 2>&1)" "driver\|GPU"
expect "cuBLAS is not loaded at the start" "$(ldd ./qlora | grep -c cublas)" "^0$"
rm -rf build/no_gpu
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
