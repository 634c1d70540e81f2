#!/bin/sh
# The command line, as a person uses it, on the tiny fixture models. Prints a line for each check and
# at the end "N passed, N failed, N skipped".
cd "$(dirname "$0")/.." || exit 1
Q=./qlora
W=build/cli-$$
M=test/fixtures/models/qwen2
rm -rf "$W"
mkdir -p "$W"
passed=0
failed=0
skipped=0

# check NAME STATUS PATTERN COMMAND...: the command exits with STATUS and prints PATTERN somewhere.
check() {
    name=$1 status=$2 pattern=$3
    shift 3
    "$@" >"$W/out" 2>&1 </dev/null
    got=$?
    if [ "$got" = "$status" ] && { [ -z "$pattern" ] || grep -q -e "$pattern" "$W/out"; }; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "  FAILED cli: $name: exit $got, expected $status and '$pattern':"
        head -n 5 "$W/out"
    fi
}

same() {
    if cmp -s "$2" "$3"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "  FAILED cli: $1: $2 and $3 differ"
    fi
}

i=0
while [ $i -lt 12 ]; do
    echo "{\"messages\": [{\"role\": \"user\", \"content\": \"Question $i, what is it?\"}, {\"role\": \"assistant\", \"content\": \"It is the answer number $i.\"}]}"
    i=$((i + 1))
done >"$W/data.jsonl"
echo '[{"instruction": "Say it.", "input": "now", "output": "It is said."}]' >"$W/alpaca.json"

check "help" 0 "usage: qlora COMMAND" $Q --help
for command in train generate chat logits tokenize quantize init info inspect; do
    check "help of $command" 0 "usage: qlora $command" $Q $command --help
done
check "version" 0 "qlora 0" $Q --version
check "no command" 2 "usage" $Q
check "unknown command" 2 "unknown command" $Q fly
check "unknown option" 2 "did you mean --lora-alpha" $Q train $M "$W/data.jsonl" --lora-alhpa 3
check "bad value" 2 "expected a whole number" $Q train $M "$W/data.jsonl" --lora-r eight
check "missing value" 2 "expected a value" $Q train $M "$W/data.jsonl" --lora-r
check "bad choice" 1 "none, nf4, fp4" $Q train $M "$W/data.jsonl" --quant int3
check "missing argument" 2 "expected MODEL DATA" $Q train $M
check "no model" 1 "config.json: not found" $Q train "$W" "$W/data.jsonl"
check "no data" 1 "nothing.jsonl: cannot open" $Q train $M "$W/nothing.jsonl" --output "$W/none"

train="$Q train $M $W/data.jsonl --epochs 2 --lr 1e-3 --lora-dropout 0.1 --mask turn"
check "train" 0 "the adapter is in" $train --output "$W/a" --batch 8 --accum 1 --threads 1
check "train again into the same place" 1 "there is a run in this directory" $train --output "$W/a"
check "underscores and =" 0 "the adapter is in" $train --output="$W/b" \
    --per_device_train_batch_size=1 --gradient_accumulation_steps=8 --threads 2
same "batch 8 x 1 = 1 x 8, threads 1 = 2" "$W/a/adapter_model.safetensors" "$W/b/adapter_model.safetensors"
check "little memory" 0 "recomputed" $train --output "$W/c" --batch 8 --accum 1 --threads 7 --memory 71M
same "memory small = large, threads 7" "$W/a/adapter_model.safetensors" "$W/c/adapter_model.safetensors"
check "too little memory" 1 "are not enough" $train --output "$W/d" --memory 1M
check "Alpaca records" 0 "the adapter is in" $Q train $M "$W/alpaca.json" --output "$W/e" --max-steps 2
check "unwritable output" 1 "cannot make the directory" $train --output /proc/none
check "generate from the adapter" 0 "Question" $Q generate "$W/a" --prompt "Question" --max-new-tokens 4
check "generate with --adapter" 0 "Question" $Q generate $M --adapter "$W/a" --prompt "Question" \
    --max-new-tokens 4 --temperature 0.8 --top-k 5 --top-p 0.9 --seed 3
printf 'one\ntwo\n' >"$W/prompts.txt"
check "prompts from a file, as JSON" 0 '"prompt": "two", "completion": "' $Q generate $M "$W/prompts.txt" \
    --json --max-new-tokens 3
check "logits" 0 "" $Q logits "$W/a" --ids 1,2,3 --output "$W/logits.safetensors"
check "an id outside the vocabulary" 1 "outside the vocabulary" $Q logits "$W/a" --ids 1,99999 \
    --output "$W/x.safetensors"
check "info of a model" 0 "qwen2: 2 layers" $Q info $M
check "info of an adapter" 0 "28 tensors" $Q info "$W/a"
check "quantize" 0 "" $Q quantize $M "$W/q4"
check "quantize onto a model" 1 "there is a model in this directory" $Q quantize $M "$W/q4"
check "train on a 4-bit directory" 0 "the adapter is in" $Q train "$W/q4" "$W/data.jsonl" \
    --output "$W/f" --epochs 2 --lr 1e-3 --lora-dropout 0.1 --mask turn --batch 8 --accum 1
same "quantised ahead = on the fly" "$W/a/adapter_model.safetensors" "$W/f/adapter_model.safetensors"
check "init" 0 "" $Q init $M "$W/random" --seed 5 --quant nf4
check "a random model computes" 0 "Hello" $Q generate "$W/random" --prompt "Hello" --max-new-tokens 2

check "eval" 0 "perplexity" $Q eval "$W/a" "$W/data.jsonl"
check "eval as JSON" 0 '"bits_per_byte": ' $Q eval $M "$W/data.jsonl" --adapter "$W/a" --json --batch 1
check "merge" 0 "merged 25600 parameters" $Q merge $M "$W/a" "$W/merged" --max-shard-size 50K
check "the merged model" 0 "Question" $Q generate "$W/merged" --prompt "Question" --max-new-tokens 4
check "merge onto another model" 1 "there is a model in this directory" $Q merge $M "$W/a" "$W/q4"
check "merge onto itself" 0 "merged" $Q merge "$W/merged" "$W/a" "$W/merged" --max-shard-size 1M
check "and it is whole" 0 "qwen2: 2 layers" $Q info "$W/merged"
check "merge onto a 4-bit directory" 0 "merged 25600 parameters" $Q merge "$W/q4" "$W/a" "$W/merged-4"
check "which becomes a 16-bit one" 0 "tensors of type BF16" $Q info "$W/merged-4"
check "an adapter for another model" 1 "another model" $Q generate test/fixtures/models/llama \
    --adapter "$W/a" --prompt x

# A model without a template of its own: what was trained with is what the merged model carries.
L=test/fixtures/models/llama
check "train without a template" 0 "the adapter is in" $Q train $L "$W/alpaca.json" --output "$W/g" --max-steps 2
check "merge it" 0 "merged" $Q merge $L "$W/g" "$W/merged-g"
$Q eval "$W/g" "$W/alpaca.json" --json --quant none | sed 's/.*"accuracy"//' >"$W/eval-a"
$Q eval "$W/merged-g" "$W/alpaca.json" --json | sed 's/.*"accuracy"//' >"$W/eval-b"
same "adapter and merged model see the same tokens" "$W/eval-a" "$W/eval-b"
check "and some" 0 '"tokens": [1-9]' cat "$W/eval-b"

# Datasets that cannot be trained on.
: >"$W/empty.jsonl"
check "empty dataset" 1 "empty.jsonl" $Q train $M "$W/empty.jsonl" --output "$W/none"
head -n 3 "$W/data.jsonl" >"$W/bad.jsonl"
echo '{"messages": [{"role": "user" "content": "x"}]}' >>"$W/bad.jsonl"
check "malformed line" 1 "bad.jsonl:4:31: expected" $Q train $M "$W/bad.jsonl" --output "$W/none"
check "--skip-bad-lines" 0 "1 of 4 records: malformed" $Q train $M "$W/bad.jsonl" --output "$W/skipped" \
    --skip-bad-lines --max-steps 1
echo '{"question": "x", "answer": "y"}' >"$W/keys.jsonl"
check "unknown columns" 1 "question" $Q train $M "$W/keys.jsonl" --output "$W/none"
check "samples too long" 1 "max-length" $Q train $M "$W/data.jsonl" --output "$W/none" --max-length 8
echo '{"messages": [{"role": "user", "content": "x"}]}' >"$W/unsupervised.jsonl"
check "nothing to learn" 1 "without a supervised token" $Q train $M "$W/unsupervised.jsonl" --output "$W/none"
check "too little disk" 1 "MB are free" $Q train $M "$W/data.jsonl" --output "$W/none" \
    --max-steps 1000000000 --save-steps 1

# What a training would see. inspect opens no weights, so a directory without them will do.
D=data/tiny
mkdir -p "$W/no-weights"
cp $D/*.json "$W/no-weights"
check "inspect" 0 "448 of these end tokens, in 448 of 448" $Q inspect "$W/no-weights" data/riddles.jsonl
check "inspect: tokens in brackets" 0 "^\[A carpet. It covers the floor.(<|im_end|>)\]" $Q inspect \
    "$W/no-weights" data/riddles.jsonl --show 1
cp "$W/out" "$W/report"
check "inspect: template" 0 "chatml, recognised in the model's own chat template" cat "$W/report"
check "inspect: format" 0 '448 records are messages, recognised by "messages"' cat "$W/report"
check "inspect: length" 0 "suggested: --max-length 64 holds 448 of 448" cat "$W/report"
check "inspect: checks" 0 "nothing is wrong" cat "$W/report"
check "inspect: what is cut off" 0 "^\[A\]{ carpet" $Q inspect $D data/riddles.jsonl --max-length 32 \
    --truncate keep-start --show 1
check "inspect: errors" 1 "error: .*no supervised end token" $Q inspect $D data/riddles.jsonl \
    --max-length 33 --truncate keep-start --take 0:3
check "train refuses the same" 1 "no supervised end token" $Q train $D data/riddles.jsonl \
    --max-length 33 --truncate keep-start --take 0:3 --output "$W/none"
check "inspect: malformed records are counted" 1 "error: 1 of 4 records: malformed" $Q inspect $D "$W/bad.jsonl"
check "inspect: packs" 0 "packs, 9[0-9]" $Q inspect $D data/riddles.jsonl --packing bfd --max-length 256
check "inspect: no model" 1 "config.json: not found" $Q inspect "$W" "$W/data.jsonl"
check "inspect: unknown columns" 1 "perhaps --field-user question --field-assistant answer" $Q inspect \
    $D "$W/keys.jsonl"
check "inspect: columns by name" 0 'recognised by "question" and "answer"' $Q inspect $D "$W/keys.jsonl" \
    --field-user question --field-assistant answer
check "inspect: text with holes" 0 "^A:\[ y(<|im_end|>)\]\|^A:\[ y(<|endoftext|>)\]" $Q inspect $D \
    "$W/keys.jsonl" --prompt-template 'Q: {question}
A: {answer}'
check "inspect: Alpaca's input has its place" 0 "^### Input:" $Q inspect $D "$W/alpaca.json" \
    --template alpaca
check "a column without the other" 1 "expected both or none" $Q inspect $D "$W/keys.jsonl" --field-user x
check "inspect: several files" 0 "461 of 461 records" $Q inspect $D data/riddles.jsonl "$W/data.jsonl" \
    "$W/alpaca.json"
check "inspect: some records" 0 "5 of 5 records" $Q inspect $D data/riddles.jsonl --take 440:445
check "a bad range" 1 "expected FIRST:END" $Q inspect $D data/riddles.jsonl --take 5
# Its JSON is valid whatever the data holds: this program's own strict parser reads it back.
printf '{"prompt": "\\u0000\\u001b[31m \\"q\\" \\\\ \342\200\250", "completion": "%s\\ud83d\\ude00"}\n' '</s><|im_end|>' \
    >"$W/hos\"tile
name.jsonl"
$Q inspect $D "$W/hos\"tile
name.jsonl" --json >"$W/report.jsonl" 2>/dev/null
check "inspect --json" 0 '"class": "learnt", "special": true' cat "$W/report.jsonl"
check "inspect --json is valid JSON" 1 'found the keys "model", "template"' $Q inspect $D "$W/report.jsonl"
if command -v script >/dev/null 2>&1 && script -qc true /dev/null >/dev/null 2>&1; then
    escape=$(printf '\033')
    check "inspect: colours on a terminal" 0 "${escape}\[0;32mA carpet. It covers the floor." \
        script -qc "$Q inspect $D data/riddles.jsonl --show 1" /dev/null
    check "inspect: NO_COLOR" 0 "^\[A carpet" \
        script -qc "NO_COLOR=1 $Q inspect $D data/riddles.jsonl --show 1" /dev/null
else
    skipped=$((skipped + 1))
    echo "  skipped cli: colours (no script command here)"
fi
check "inspect never drives a terminal" 0 '\\x1B\[31m' $Q inspect $D "$W/hos\"tile
name.jsonl" --show 1

# Several files, packs, a directory with its own held-out set.
check "train on packs of several files" 0 "packs of at most 96 tokens" $Q train $D data/riddles.jsonl \
    "$W/data.jsonl" --packing bfd --max-length 96 --max-steps 2 --output "$W/packed"
mkdir -p "$W/dir"
head -n 40 data/riddles.jsonl >"$W/dir/train.jsonl"
head -n 5 data/riddles.jsonl >"$W/dir/valid.jsonl"
check "train on a directory" 0 "5 of 5 held-out samples are also learnt from" $Q train $D "$W/dir" \
    --max-steps 1 --output "$W/from-dir"
check "eval of a directory" 1 "without test.jsonl" $Q eval $D "$W/dir"
check "bad truncation" 1 "drop, keep-start, keep-end" $Q train $D "$W/dir" --truncate cut

# Every option that README names is one of the program's.
for command in train generate chat eval merge quantize tokenize logits init info inspect; do
    $Q $command --help
done >"$W/help"
unknown=
for option in $(grep -o -e '--[a-z][a-z-]*' README.md | sort -u); do
    case $option in --help|--version|--lr|--epochs|--batch|--accum) continue ;; esac
    grep -q -e "  $option " "$W/help" || unknown="$unknown $option"
done
check "README names no option that there is not" 0 "" test -z "$unknown"
[ -z "$unknown" ] || echo "    not options:$unknown"

# Ctrl-C saves the last completed step; --resume goes on from it.
$Q train $M "$W/data.jsonl" --output "$W/long" --max-steps 1000000 --save-steps 100000 >"$W/out" 2>&1 &
pid=$!
i=0
while [ $i -lt 100 ] && ! grep -q "step 3/" "$W/out"; do sleep 0.1; i=$((i + 1)); done
kill -INT $pid
wait $pid
if [ $? = 130 ] && ls "$W/long" | grep -q checkpoint; then passed=$((passed + 1)); else
    failed=$((failed + 1))
    echo "  FAILED cli: interrupt"
    tail -n 3 "$W/out"
fi
check "resume with other settings" 1 "other settings" $Q train $M "$W/data.jsonl" --resume "$W/long" \
    --max-steps 5

printf 'Hello there,\n  two  lines: \303\251\344\275\240\n' >"$W/text"
$Q tokenize $M <"$W/text" | sed -n 's/^ *\([0-9][0-9]*\) .*/\1/p' | $Q tokenize $M --decode >"$W/back"
same "tokenize and back" "$W/text" "$W/back"
printf 'Hello\n/system Be brief.\nHi\n/regen\n/help\n/exit\n' | $Q chat "$W/a" --max-new-tokens 3 >"$W/chat" 2>&1
if [ $? = 0 ] && grep -q "/regen" "$W/chat"; then passed=$((passed + 1)); else
    failed=$((failed + 1))
    echo "  FAILED cli: chat"
    cat "$W/chat"
fi

check "vendored in C" 0 "" build/vendor_c $M "$W/data.jsonl"
if [ -x build/vendor_cpp ]; then check "vendored in C++" 0 "" build/vendor_cpp $M; else
    skipped=$((skipped + 1))
    echo "  skipped cli: the C++ example (no C++ compiler here)"
fi

rm -rf "$W"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
