#!/usr/bin/env bash
# A shell inside a running job, with its Ray cluster at hand:
#
#     bash slurm/attach.sh JOB_ID                  # on the first node
#     bash slurm/attach.sh JOB_ID NODE             # on another one
#     bash slurm/attach.sh JOB_ID NODE COMMAND...  # one command instead of a shell: ray status, nvidia-smi, py-spy ...
#
# The shell shares the job's CPUs and GPUs (srun --overlap) and ends with it. In a container job it is outside of the
# container. If RAY_CLUSTER_LOGS was set in the job, set it here too.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
id=$1
facts=$(scontrol -o show job "$id" | head -1)
fact() { tr ' ' '\n' <<<"$facts" | sed -n "s/^$1=//p;" | head -1; }
if [ "$(fact JobState)" != RUNNING ]; then
    echo "attach.sh: job $id is $(fact JobState)" >&2
    exit 1
fi
node=${2:-$(fact BatchHost)}
logs=$(fact StdOut)
logs=${RAY_CLUSTER_LOGS:-${logs%.log}.d}
if [ ! -r "$logs/environment" ]; then
    echo "attach.sh: job $id has no Ray cluster (yet): there is no $logs/environment" >&2
    exit 1
fi
words=("${@:3}")
pty=()
if [ ${#words[@]} = 0 ]; then words=(bash -i) pty=(--pty); fi
# shellcheck disable=SC2016  # the inner bash expands it
exec srun --jobid="$(fact JobId)" --overlap ${pty[@]+"${pty[@]}"} --nodes=1 --ntasks=1 --nodelist="$node" --mpi=none \
    bash -c 'source "$0" && exec "$@"' "$logs/environment" "${words[@]}"
