#!/usr/bin/env bash
# From text to a pretrained model, step by step: every step is a command that you can type yourself.
# Usage: docs/demo/run.sh [FOLDER] [more words for pretrain]
# FOLDER is .demo by default; run it again after an interruption and it goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=${BIN:-$(cd "$here/../.." && pwd)/${VENV:-.venv}/bin}
folder=${1:-.demo}
shift || true
mkdir -p "$folder"
started=$SECONDS

step() { printf '\n\033[1m== %s\033[0m  (%d s)\n' "$1" "$((SECONDS - started))"; }
run() { # shows the command as one would type it, then runs it
    printf '$ %s' "$(basename "$1")"
    for word in "${@:2}"; do
        word=${word#"$PWD"/}
        case $word in
            *[!A-Za-z0-9_./:,=+-]*) printf ' %q' "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    echo
    "$@"
}

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true); fi
case $gpus in
    0) layout="--nproc_per_node 2 --tp 2 --sequence_parallel true --train.precision fp32" ;;
    1) layout="--nproc_per_node 1 --tp 1 --train.precision bf16" ;;
    *) layout="--nproc_per_node 2 --tp 2 --sequence_parallel true --train.precision bf16" ;;
esac

step "1. Real text: the source of Python's standard library and of PyTorch"
[ -e "$folder/corpus.jsonl" ] || run "$bin/python" "$here/corpus.py" "$folder/corpus.jsonl.new"
[ -e "$folder/corpus.jsonl" ] || mv "$folder/corpus.jsonl.new" "$folder/corpus.jsonl"

step "2. A byte-level BPE tokenizer, trained on it"
[ -e "$folder/tokenizer" ] ||
    run "$bin/swift-dist" data train-tokenizer "$folder/corpus.jsonl" --vocab_size 4096 --output "$folder/tokenizer"

step "3. Tokens, split into training and validation documents"
[ -e "$folder/data/code_train.idx" ] ||
    run "$bin/swift-dist" data prepare "$folder/corpus.jsonl" --tokenizer "$folder/tokenizer" --append_eod \
        --split 0.98,0.02 --output "$folder/data/code"

step "4. Pretraining through Ray: $layout"
# shellcheck disable=SC2086  # $layout is a list of words
run "$bin/swift-dist" pretrain "$here/job.yaml" $layout --dataset "$folder/data/code_train" \
    --val_dataset "$folder/data/code_validation" --tokenizer "$folder/tokenizer" --output "$folder/run" "$@"

step "5. The loss curve"
run "$bin/swift-dist" runs plot "$folder/run" --output "$folder/loss.png"

step "6. Has it learnt anything? Validation loss against a unigram model"
run "$bin/python" "$here/baseline.py" "$folder/run"

step "7. Export to Hugging Face format"
rm -rf "$folder/model"
run "$bin/swift-dist" convert megatron-to-hf "$folder/run" "$folder/model"

step "8. transformers continues a line"
run "$bin/python" "$here/generate.py" "$folder/model" "def __init__(self"

step "Done"
bin=${bin#"$PWD"/}
cat <<TXT
run         $folder/run          job.yaml, metrics.jsonl, logs, checkpoints
loss curve  $folder/loss.png
model       $folder/model        AutoModelForCausalLM.from_pretrained("$folder/model")

What to type next:
  $bin/swift-dist runs show $folder/run
  $bin/swift-dist pretrain $folder/run/job.yaml --train.steps 1000     # goes on where it ended
  $bin/swift-dist infer --model $folder/model --prompt "import " --complete
  $bin/swift-dist deploy --model $folder/model                         # an OpenAI API for it
  $bin/swift-dist recipes list                                         # jobs for real models on real clusters
  $bin/swift-dist pretrain --help                                      # every key of a job
TXT
