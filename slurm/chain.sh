#!/usr/bin/env bash
# From text to an exported model by one command: three jobs, each of which waits for the one before to succeed.
#
#     bash slurm/chain.sh JOB.yaml RUN_FOLDER INPUT... --tokenizer FOLDER --output PREFIX
#
# The words after RUN_FOLDER go to `swift-dist data prepare`; JOB.yaml names PREFIX as its data.train. The model comes
# into RUN_FOLDER/hf. What all three jobs need of Slurm can be set with sbatch's own variables (SBATCH_PARTITION,
# SBATCH_ACCOUNT, ...), what one of them needs in PREPARE, PRETRAIN and EXPORT:
#
#     PRETRAIN="--nodes=8 --time=3-0" bash slurm/chain.sh ...
#
# Prints "prepare ID", "pretrain ID" and "export ID". If a job fails, those that wait for it are cancelled.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
job=$1 run=$2
shift 2
read -ra prepare <<<"${PREPARE:-}"
read -ra pretrain <<<"${PRETRAIN:-}"
read -ra export <<<"${EXPORT:-}"

after() { echo "--dependency=afterok:$1 --kill-on-invalid-dep=yes"; } # without the second it would wait for ever
submit() { sbatch --parsable "$@" | cut -d';' -f1; }

first=$(submit ${prepare[@]+"${prepare[@]}"} "$here/prepare.sbatch" "$@")
echo "prepare $first"
# shellcheck disable=SC2046  # two words
second=$(submit $(after "$first") ${pretrain[@]+"${pretrain[@]}"} "$here/pretrain.sbatch" "$job" "$run")
echo "pretrain $second"
# shellcheck disable=SC2046
third=$(submit $(after "$second") ${export[@]+"${export[@]}"} "$here/export.sbatch" "$run" "$run/hf")
echo "export $third"
