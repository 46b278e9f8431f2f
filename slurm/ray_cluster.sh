# shellcheck shell=bash
# A Ray cluster over the nodes of a Slurm job, and one command in it. In a batch script:
#
#     source ray_cluster.sh
#     ray_cluster_run swift-dist pretrain job.yaml --output runs/x
#
# The head and the other nodes are one job step of `ray start --block`; the command, the driver, is another, on the
# first node. The exit code is the driver's, or
#   72  not all nodes joined in time
#   73  a node's Ray ended while the driver ran
#   74  the job's log folder cannot be seen from every node
#   75  restarted more often than RAY_CLUSTER_MAX_RESTARTS
#
# USR1 to the batch script (#SBATCH --signal=B:USR1@120) or preemption: the driver is asked, by SIGTERM, to checkpoint
# and end; then the job is requeued, and the driver, run again with the same words, resumes. TERM to the batch script
# (scancel --batch --signal=TERM): the same without a requeue. A lost node: requeued too. (All need #SBATCH --requeue.)
#
# Settings, all optional, as environment variables before `source`:
: "${RAY_CLUSTER_LOGS:=}"            # folder for ray_<node>.log, the token, ... (default: beside the job's output file)
: "${RAY_CLUSTER_PORTS:=24000-31999}" # band that jobs share; each gets 32 of it, by its job id (see _rc_ports)
: "${RAY_CLUSTER_WORKER_PORTS:=}"    # FIRST-LAST for Ray's workers (default: the kernel picks free ones)
: "${RAY_CLUSTER_INTERFACE:=}"       # network interface, e.g. ib0 (default: that of the nodes' Slurm addresses)
: "${RAY_CLUSTER_JOIN_SECONDS:=180}" # for all nodes to join
: "${RAY_CLUSTER_MAX_RESTARTS:=10}"  # requeues of this job, whatever their cause
: "${RAY_CLUSTER_STOP_SECONDS:=600}" # for the driver to checkpoint and end once it was asked
: "${RAY_CLUSTER_GPUS:=}"            # GPUs a node (default: what Slurm says, else what Ray finds)
: "${RAY_CLUSTER_DASHBOARD:=false}"  # serve Ray's dashboard on the first node's 127.0.0.1
: "${RAY_CLUSTER_OBJECT_STORE_BYTES:=1000000000}" # of /dev/shm a node; tensors do not go through it
: "${RAY_CLUSTER_TEMP:=/tmp}"        # node-local folder; keep it short: paths of sockets in it end at 107 characters
: "${RAY_CLUSTER_IMAGE:=}"           # container image to run everything in
: "${RAY_CLUSTER_RUNTIME:=pyxis}"    # what runs it: pyxis (srun --container-image) or apptainer
: "${RAY_CLUSTER_MOUNTS:=}"          # FOLDER[:FOLDER_INSIDE],... to see inside it, besides the log folder

# --- on every node (these functions are sent to the steps as text) ---------------------------------------------------

# One node's Ray. Environment: what ray_cluster_run exports. Runs until it is told to end.
_rc_node() {
    local child stopping='' me=${SLURMD_NODENAME:-$HOSTNAME} index=$SLURM_NODEID ip base words=() addresses=()
    if [ ! -r "$RAY_AUTH_TOKEN_PATH" ]; then
        echo "ray_cluster: $me cannot read $RAY_AUTH_TOKEN_PATH: the log folder must be shared by all nodes" >&2
        return 74
    fi
    exec >>"$RAY_CLUSTER_LOGS/ray_$me.log" 2>&1
    ulimit -n "$(ulimit -Hn)" 2>/dev/null
    read -ra addresses <<<"$_RC_ADDRESSES"
    ip=${addresses[index]}
    if [ -n "$RAY_CLUSTER_INTERFACE" ]; then
        ip=$(ip -4 -o addr show dev "$RAY_CLUSTER_INTERFACE" | sed -n 's/.* inet \([0-9.]*\).*/\1/p;q')
    fi
    base=$((_RC_BASE + 8 + index % 3 * 8)) # by index, for nodes that are one machine (a test bed)
    words=(--node-ip-address="$ip" --num-cpus="$_RC_CPUS" --object-store-memory="$RAY_CLUSTER_OBJECT_STORE_BYTES"
        --temp-dir="$RAY_CLUSTER_TEMP/ray-$SLURM_JOB_ID" --disable-usage-stats --block
        --node-manager-port=$((base)) --object-manager-port=$((base + 1)) --runtime-env-agent-port=$((base + 2))
        --dashboard-agent-listen-port=$((base + 3)) --dashboard-agent-grpc-port=$((base + 4))
        --metrics-export-port=$((base + 5)))
    [ -z "$RAY_CLUSTER_GPUS" ] || words+=(--num-gpus="$RAY_CLUSTER_GPUS")
    : "${RAY_CLUSTER_WORKER_PORTS:=0-0}" # Ray's own default is 10002-19999 for every cluster on the machine
    words+=(--min-worker-port="${RAY_CLUSTER_WORKER_PORTS%-*}" --max-worker-port="${RAY_CLUSTER_WORKER_PORTS#*-}")
    if [ "$me" = "$_RC_HEAD" ]; then
        words+=(--head --port="$_RC_BASE" --ray-client-server-port=$((_RC_BASE + 1))
            --include-dashboard="$RAY_CLUSTER_DASHBOARD" --dashboard-host=127.0.0.1 --dashboard-port=$((_RC_BASE + 2)))
    else
        words+=(--address="$RAY_ADDRESS")
        until (: >"/dev/tcp/${RAY_ADDRESS%:*}/${RAY_ADDRESS#*:}") 2>/dev/null; do sleep 0.2; done # the step may end us
    fi
    local temp=$RAY_CLUSTER_TEMP/ray-$SLURM_JOB_ID name
    for name in $(compgen -e); do # a library that finds these believes that Slurm or MPI started it
        case $name in SLURM_* | SLURMD_* | SRUN_* | SBATCH_* | PMI_* | PMI2_* | PMIX_* | OMPI_* | MPI_*) unset "$name" ;; esac
    done
    echo "ray_cluster: $(date +%FT%T) $me: ray start ${words[*]}"
    local mark=$me-$$-$RANDOM # in the environment of all that Ray starts
    # Asked to end, Ray would drain for up to 30 s for work that nobody waits for. Killed, its reaper ends the rest.
    trap 'stopping=yes; kill -KILL "$child" 2>/dev/null' TERM
    local code from try log=$RAY_CLUSTER_LOGS/ray_$me.log
    for try in 1 2 3; do
        from=$(wc -c <"$log")
        RAY_CLUSTER_NODE=$mark ray start "${words[@]}" </dev/null &
        child=$!
        wait "$child"
        code=$?
        while kill -0 "$child" 2>/dev/null; do # the trap ended that wait
            wait "$child"
            code=$?
        done
        for _ in {1..50}; do
            if ! grep -qsF "$temp/" /proc/[0-9]*/cmdline; then
                rm -rf "$temp" # of nobody: nodes that are one machine share it
                break
            fi
            sleep 0.1
        done
        # An agent whose raylet goes while it starts waits for it for a minute, in a session and under a name of its own.
        grep -lsF "RAY_CLUSTER_NODE=$mark" /proc/[0-9]*/environ | while IFS=/ read -r _ _ name _; do
            kill -KILL "$name" 2>/dev/null
        done
        echo "ray_cluster: $(date +%FT%T) $me: ${stopping:+told to end; }ray ended with $code"
        [ -z "$stopping" ] || return 0
        # Ray itself gives a node up that is not there after 30 s, which a busy one, or file system, may take.
        if [ $code = 0 ] || [ $try = 3 ] || [ $SECONDS -ge "$RAY_CLUSTER_JOIN_SECONDS" ] ||
            tail -c +$((from + 1)) "$log" | grep -q 'Ray runtime started'; then
            return $((code == 0 ? 1 : code))
        fi
        echo "ray_cluster: $me: it has not been up yet: once more"
        sleep 1
        [ -z "$stopping" ] || return 0
    done
}

# The driver: the command, once all nodes are there.
_rc_driver() {
    python3 -m swift_dist.cluster.join --nodes "$SLURM_JOB_NUM_NODES" --seconds "$RAY_CLUSTER_JOIN_SECONDS" || return
    echo $$ >"$RAY_CLUSTER_LOGS/driver.pid" # also the command's
    exec "$@"
}

# --- in the batch script ---------------------------------------------------------------------------------------------

_rc_say() { echo "ray_cluster: $(date +%T) $*" >&2; }

# What Slurm knows of this job under a name, such as StdOut.
_rc_fact() { scontrol -o show job "$_rc_job" | tr ' ' '\n' | sed -n "s/^$1=//p;" | head -1; }

# srun over all nodes, or with more words over some of them; in the container if there is one.
_rc_srun() {
    local words=(--overlap --mpi=none --export=ALL --cpus-per-task="$_RC_CPUS" --ntasks-per-node=1)
    srun "${words[@]}" "$@"
}

# Runs a function of this file, sent as text, in a step: options of srun, "--", the function, its arguments.
_rc_step() {
    local options=() mounts=$RAY_CLUSTER_LOGS${RAY_CLUSTER_MOUNTS:+,$RAY_CLUSTER_MOUNTS} enter=()
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    if [ -n "$RAY_CLUSTER_IMAGE" ] && [ "$RAY_CLUSTER_RUNTIME" = apptainer ]; then
        enter=(apptainer exec --bind "$mounts")
        [ "$RAY_CLUSTER_GPUS" = 0 ] || enter+=(--nv) # empty: Ray is to find them
        enter+=("$RAY_CLUSTER_IMAGE")
    elif [ -n "$RAY_CLUSTER_IMAGE" ]; then
        # pyxis wants both sides of a mount
        options+=(--container-image="$RAY_CLUSTER_IMAGE" --container-workdir="$PWD" --container-mounts="$(
            tr ',' '\n' <<<"$mounts,$PWD" | sed 's/^[^:]*$/&:&/' | paste -sd,
        )")
    fi
    local function=$1
    shift
    _rc_srun "${options[@]}" "${enter[@]}" bash -c "$(declare -f "$function"); $function \"\$@\"" "$function" "$@"
}

# 32 ports of the band by the job id: jobs that run at once on one node have ids near each other, and so other ports.
_rc_ports() {
    local first=${RAY_CLUSTER_PORTS%-*} last=${RAY_CLUSTER_PORTS#*-}
    if ! [[ $RAY_CLUSTER_PORTS =~ ^[0-9]+-[0-9]+$ && $last -lt 65536 && $((last - first)) -ge 31 ]]; then
        _rc_say "RAY_CLUSTER_PORTS is $RAY_CLUSTER_PORTS; it must be FIRST-LAST with 32 ports at least, below 65536"
        return 2
    fi
    export _RC_BASE=$((first + SLURM_JOB_ID % ((last - first + 1) / 32) * 32))
}

# Names and addresses of the nodes, in Slurm's order.
_rc_find_nodes() {
    local name address facts
    _RC_ADDRESSES='' _RC_HEAD=$SLURMD_NODENAME
    facts=$(scontrol -o show node "$SLURM_JOB_NODELIST") || return
    while read -r name; do
        address=$(sed -n "s/^NodeName=$name .*NodeAddr=\([^ ]*\).*/\1/p" <<<"$facts")
        [[ $address =~ ^[0-9.]+$ ]] || address=$(_rc_resolve "$address" "$name") || return
        _RC_ADDRESSES+="$address "
        [ "$name" != "$_RC_HEAD" ] || RAY_ADDRESS=$address:$_RC_BASE
    done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [ -n "$RAY_CLUSTER_INTERFACE" ]; then
        address=$(ip -4 -o addr show dev "$RAY_CLUSTER_INTERFACE" | sed -n 's/.* inet \([0-9.]*\).*/\1/p;q')
        [ -n "$address" ] || { _rc_say "$_RC_HEAD has no address at $RAY_CLUSTER_INTERFACE"; return 1; }
        RAY_ADDRESS=$address:$_RC_BASE
    fi
    export _RC_ADDRESSES _RC_HEAD RAY_ADDRESS
}

# The IPv4 address of a host name. A host may know itself as 127.0.1.1, which is of no use to the others.
_rc_resolve() {
    local address
    address=$(getent ahostsv4 "$1" | sed -n 's/ .*//p;q')
    if [[ $2 = "$_RC_HEAD" && $address = 127.* ]]; then address=$(hostname -I | sed 's/ .*//'); fi
    [ -n "$address" ] || { _rc_say "$1, the address of node $2, cannot be resolved"; return 1; }
    echo "$address"
}

# What every process of the cluster must know. Its token is this attempt's own.
_rc_export() {
    local counts=${SLURM_JOB_CPUS_PER_NODE:-1}
    # "8(x2),4": the fewest that a node has. Neither the machine's CPUs nor the one that a bare step would get.
    _RC_CPUS=$(tr ',' '\n' <<<"$counts" | sed 's/(.*//' | sort -n | head -1)
    : "${RAY_CLUSTER_GPUS:=${SLURM_GPUS_ON_NODE:-}}"
    export _RC_CPUS RAY_CLUSTER_LOGS RAY_CLUSTER_INTERFACE RAY_CLUSTER_GPUS RAY_CLUSTER_TEMP RAY_CLUSTER_DASHBOARD
    export RAY_CLUSTER_OBJECT_STORE_BYTES RAY_CLUSTER_WORKER_PORTS RAY_CLUSTER_JOIN_SECONDS
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_CLUSTER_LOGS/token
    unset RAY_AUTH_TOKEN SLURM_TRES_PER_TASK SRUN_CPUS_PER_TASK
    export RAY_USAGE_STATS_ENABLED=0
    export RAY_worker_niceness=0                 # Ray's own 15 lets any other process of the node slow a rank down
    export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0  # a rank without a GPU of its own keeps CUDA_VISIBLE_DEVICES
    # A dead node is noticed after threshold x (period + timeout) = 15 s instead of 65 s.
    export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=3
    mkdir -p "$RAY_CLUSTER_LOGS" && rm -f "$RAY_CLUSTER_LOGS/driver.pid" || return
    (
        umask 077
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
        echo "export RAY_ADDRESS=$RAY_ADDRESS RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH" \
            >"$RAY_CLUSTER_LOGS/environment" # attach.sh reads it
    )
}

# A signal to all processes of a step, by its name. Not to its srun, which would kill the step.
_rc_signal() {
    local step
    step=$(squeue -h --steps --jobs="$_rc_job" -o '%i %j' | sed -n "s/ $2$//p")
    [ -n "$step" ] || return
    # Some versions complain, after they delivered it, that the job's other nodes know no such step.
    scancel --quiet --signal="$1" "$step" 2>/dev/null || true
}

# SIGTERM to the driver alone, which ends its children in its own order (a deployment's front goes last); to its whole
# step where it does not run yet or cannot be seen from here.
_rc_ask_driver() {
    local pid
    pid=$(cat "$RAY_CLUSTER_LOGS/driver.pid" 2>/dev/null)
    if [ -n "$pid" ] && grep -qsaF "RAY_CLUSTER_LOGS=$RAY_CLUSTER_LOGS" "/proc/$pid/environ"; then
        kill -TERM "$pid" 2>/dev/null && return
    fi
    _rc_signal TERM rc-driver || kill -TERM "$_rc_driver_pid" 2>/dev/null
}

_rc_on_signal() {
    _rc_say "$1: asking the driver to checkpoint and end${2:+, then $2}"
    _rc_after=$2 _rc_asked_at=$SECONDS
    [ -z "$_rc_driver_pid" ] || _rc_ask_driver
}

# Ends what runs of the cluster; safe to call twice.
_rc_end() {
    local step pid deadline
    for step in driver nodes; do
        if [ $step = driver ]; then pid=$_rc_driver_pid; else pid=$_rc_nodes_pid; fi
        kill -0 "$pid" 2>/dev/null || continue
        _rc_signal TERM "rc-$step"
        deadline=$((SECONDS + 15))
        while kill -0 "$pid" 2>/dev/null && [ $SECONDS -lt $deadline ]; do sleep 0.1; done
        kill -TERM "$pid" 2>/dev/null # kills the step
    done
    rm -f "$RAY_CLUSTER_LOGS"/{token,environment,driver.pid}
}

# Whether a node of the job no longer runs what it is told.
_rc_node_is_lost() {
    ! timeout 30 srun --overlap --mpi=none --ntasks-per-node=1 --nodes="$SLURM_JOB_NUM_NODES" \
        --ntasks="$SLURM_JOB_NUM_NODES" true >/dev/null 2>&1
}

# Puts the job back into the queue, which ends this script; returns the driver's code where it may not go on.
_rc_requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$RAY_CLUSTER_MAX_RESTARTS" ]; then
        _rc_say "$1; no requeue after ${SLURM_RESTART_COUNT:-0} restarts (RAY_CLUSTER_MAX_RESTARTS)"
        return "$2"
    fi
    _rc_say "$1: back into the queue"
    trap : USR1 TERM
    _rc_end
    scontrol requeue "$_rc_job" || return "$2"
    sleep 600 # Slurm ends this script
    exit "$2"
}

# Until the driver ended, or the nodes' step did.
_rc_watch() {
    while kill -0 "$_rc_driver_pid" 2>/dev/null; do
        if ! kill -0 "$_rc_nodes_pid" 2>/dev/null; then
            wait "$_rc_nodes_pid"
            [ $? != 74 ] || return 74
            _rc_say "Ray ended on a node; the newest lines of $RAY_CLUSTER_LOGS/ray_*.log:"
            tail -n 5 "$RAY_CLUSTER_LOGS"/ray_*.log >&2
            return 73
        fi
        if [ -n "$_rc_asked_at" ] && [ $((SECONDS - _rc_asked_at)) -gt "$RAY_CLUSTER_STOP_SECONDS" ]; then
            _rc_say "the driver did not end within $RAY_CLUSTER_STOP_SECONDS s (RAY_CLUSTER_STOP_SECONDS)"
            return 130
        fi
        sleep 0.3 &
        wait $! # a trap runs at once, not after the sleep
    done
    wait "$_rc_driver_pid"
}

# Runs a command in a Ray cluster over the job's nodes; returns its exit code.
ray_cluster_run() {
    local code
    _rc_driver_pid='' _rc_nodes_pid='' _rc_after='' _rc_asked_at=''
    if [ "${SLURM_RESTART_COUNT:-0}" -gt "$RAY_CLUSTER_MAX_RESTARTS" ]; then
        _rc_say "started for the $((SLURM_RESTART_COUNT + 1))th time: no more (RAY_CLUSTER_MAX_RESTARTS)"
        return 75
    fi
    _rc_ports && _rc_find_nodes && _rc_export || return
    trap _rc_end EXIT
    trap '_rc_on_signal USR1 requeue' USR1
    trap '_rc_on_signal TERM ""' TERM
    _rc_step --job-name=rc-nodes --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \
        -- _rc_node </dev/null &
    _rc_nodes_pid=$!
    _rc_step --job-name=rc-driver --nodes=1 --ntasks=1 --nodelist="$_RC_HEAD" -- _rc_driver "$@" </dev/null &
    _rc_driver_pid=$!
    _rc_watch
    code=$?
    if [ $code = 0 ]; then
        :
    elif [[ $code = 130 || $code = 143 ]]; then # it was asked to end; 143: before it could listen
        code=130
        if [ -n "$_rc_after" ] || [[ $(_rc_fact PreemptTime) = 2* ]]; then # a year
            _rc_requeue "the driver has ended on request" $code
            code=$?
        fi
    elif [ $code != 72 ] && [ $code != 2 ] && [ "$(_rc_fact JobState)" = RUNNING ] && _rc_node_is_lost; then
        _rc_requeue "a node is lost" $code
        code=$?
    fi
    _rc_end
    trap - EXIT USR1 TERM
    return $code
}

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "ray_cluster.sh belongs into a batch script: there is no SLURM_JOB_ID" >&2
    exit 1
fi
_rc_job=$SLURM_JOB_ID # the id of one task of an array may be that of the whole array too
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || _rc_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
if [ -z "$RAY_CLUSTER_LOGS" ]; then
    RAY_CLUSTER_LOGS=$(_rc_fact StdOut)
    RAY_CLUSTER_LOGS=${RAY_CLUSTER_LOGS%.log}.d
fi
mkdir -p "$RAY_CLUSTER_LOGS"
