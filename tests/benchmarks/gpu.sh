#!/usr/bin/env bash
# Everything that only an NVIDIA GPU can show, on one of them, in 12 minutes at most; `make gpu` runs it.
#
#   bash tests/benchmarks/gpu.sh [FOLDER]
#
# FOLDER (runs/gpu) takes gpu.md, the tables to be pasted, and each step's whole output. A step that runs out of its time
# or fails is noted there, the others go on, and the exit status is 1. GPU_DRY=1 runs small sizes on a CPU, to try this
# script itself.
set -u
cd "$(dirname "$0")/../.." || exit 1
folder=${1:-runs/gpu}
dry=${GPU_DRY:-}
bin=${VENV:-.venv}/bin
failed=0
mkdir -p "$folder"
report=$folder/gpu.md
tests=(tests/kernels/test_on_gpu.py tests/runs/test_throughput.py)

# step SECONDS NAME COMMAND...: the tables and results that it printed go into the report, and its last lines where it
# fails.
step() {
    local limit=$1 name=$2 status=0 began=$SECONDS
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1 || status=$?
    # shellcheck disable=SC2016  # the backquotes are Markdown's
    printf '\n## %s\n\n`%s`\n\nexit %d after %d s\n\n' "$name" "$*" "$status" $((SECONDS - began)) >>"$report"
    if [ "$status" -ne 0 ]; then
        failed=1
        { echo '```'; tail -n 40 "$folder/$name.log"; echo '```'; } >>"$report"
    fi
    grep -E '^\||ratios to eager| (passed|failed|skipped)' "$folder/$name.log" >>"$report"
    echo "$name: exit $status after $((SECONDS - began)) s"
}

{
    printf '# One GPU, %s\n\n' "$(date -u +%F)"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no NVIDIA GPU'
    "$bin/python" -c 'import torch; print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")'
    git log -1 --format='commit %h' 2>/dev/null
} >"$report"

# The shape of an 8B model, of which 4 layers are enough for one layer's kernels and the output layer to be measured:
# random weights of all 32 take longer to be drawn than all of this may.
mkdir -p "$folder/model"
"$bin/python" - "$folder/model" ${dry:+small} <<'END'
import json, pathlib, sys
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 1048576, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "bos_token_id": 128000, "eos_token_id": 128001,
}
if sys.argv[2:]:
    config |= {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
pathlib.Path(sys.argv[1], "config.json").write_text(json.dumps(config))
END

if [ -n "$dry" ]; then
    step 300 tests "$bin/python" -m pytest -q -m gpu "${tests[@]}" -p no:cacheprovider
    step 300 kernels "$bin/python" tests/benchmarks/bench_kernels.py --device cpu --tokens 64 --kernels zigzag rms_norm
    step 300 length "$bin/swift-dist" bench length --model "$folder/model" --features base,recompute --max_length 64 \
        --min_length 32 --memory 4GiB --accelerator cpu --output "$folder/length"
else
    step 270 tests "$bin/python" -m pytest -q -m gpu "${tests[@]}" -p no:cacheprovider
    step 220 kernels "$bin/python" tests/benchmarks/bench_kernels.py --rounds 5 --json "$folder/kernels.json"
    step 200 length "$bin/swift-dist" bench length --model "$folder/model" --tuner_type lora --features base,all \
        --min_length 32768 --max_length 262144 --output "$folder/length"
fi
echo "written: $report"
exit "$failed"
