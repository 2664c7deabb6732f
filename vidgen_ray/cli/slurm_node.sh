set -u
say() { echo "vidgen: $1" >&2; }
fail() { say "$1"; exit 4; }
# A task of an array may have the id of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
code=4 stopped='' child='' began=''
# Seconds that Ray has to start on all nodes: a network disk may be slow.
start_s=300

# A signal asks vidgen, or Ray of a node that has joined, to finish the shots in progress. Bash fails to run a trap between two
# command substitutions of one word: each has a line of its own.
stop_work() { if [ -n "$child" ]; then kill -TERM "$child"; else end_ray; fi; }
trap 'stopped=limit; stop_work' USR1
trap 'stopped=cancelled; stop_work' TERM
end_ray() { [ -z "${ray[1]:-}" ] || exec {ray[1]}>&-; }

command -v srun > /dev/null || fail "no srun on $HOSTNAME: submit this file with sbatch, outside of a container"
# Otherwise sbatch --export=NONE leaves steps without functions and variables.
export SLURM_EXPORT_ENV=ALL
export RAY_AUTH_MODE=token RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S RAY_gcs_rpc_server_reconnect_timeout_s=15
export role address found reach_s RAY_AUTH_TOKEN

# All nodes need the same versions.
versions() {
    local ours python
    ours=$(run vidgen --version) || return
    python=$(run python3 --version) || return
    echo "$ours with $python"
}

free_ports() { run python3 -c 'import socket; all = [socket.create_server(("", 0)) for _ in range(3)]; print(*(s.getsockname()[1] for s in all))'; }

# The address of this node for the others: that of its name, of the interface if one is named, but never of loopback.
own_address() { addresses | grep -oE '[0-9]+(\.[0-9]+){3}' | grep -v '^127\.' | head -n 1; }
addresses() {
    if [ -n "$interface" ]; then ip -4 -brief address show dev "$interface"; return; fi
    getent ahostsv4 "$SLURMD_NODENAME"
    hostname -I
}

# Sets the options of Ray for the memory that Slurm has given the job on this node, if it gives memory at all.
memory_options() {
    local mb store shared
    mb=${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_CPU:-0} * SLURM_CPUS_ON_NODE + ${SLURM_MEM_PER_GPU:-0} * ${SLURM_GPUS_ON_NODE:-0}))}
    shared=$(df --output=avail -BM /dev/shm | tr -dc 0-9)
    store=$((mb * 3 / 10 < shared * 9 / 10 ? mb * 3 / 10 : shared * 9 / 10))
    memory=()
    [ "$mb" = 0 ] || memory=(--memory=$(((mb - store) << 20)) --object-store-memory=$((store << 20)))
}

# Runs Ray on a node until standard input ends, with ports of its own: other jobs may be on the same node. Prints "joined NODE", or
# "failed NODE REASON": the step itself does not fail.
ray_node() {
    local base log ours ports memory temporary='' ray
    ours=$(versions 2>&1)
    [ "$ours" = "$found" ] ||
        give_up "$SLURMD_NODENAME has vidgen $ours, the first node $found. Install it where all nodes see it, or use --container"
    read -r -a ports <<< "$(free_ports)"
    memory_options
    # Paths of sockets are limited to 107 characters.
    base=${TMPDIR:-/tmp}
    [ "${#base}" -lt 40 ] || base=/tmp
    # Folders of killed jobs have no lock.
    find "$base" -maxdepth 1 -name 'vidgen-ray.*' -user "$UID" -mmin +1 -exec flock --nonblock {} rm -rf {} \;
    temporary=$(mktemp -d "$base/vidgen-ray.XXXXXX") || give_up "$SLURMD_NODENAME: no folder for Ray in $base"
    exec 9< "$temporary"
    flock 9
    log=$temporary/start.log
    set -- --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "${memory[@]}" --temp-dir="$temporary" \
        --disable-usage-stats --include-log-monitor=false --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port="${ports[0]}"
    if [ "$role" = head ] && [ "$SLURM_NODEID" = 0 ]; then
        set -- "$@" --head --node-ip-address="${address%:*}" --port="${address##*:}" --ray-client-server-port="${ports[1]}" --include-dashboard=false
    else
        until timeout 5 bash -c ": < /dev/tcp/${address%:*}/${address##*:}" 2> /dev/null; do
            [ "$SECONDS" -lt "$reach_s" ] || give_up "$SLURMD_NODENAME does not reach Ray at $address"
            sleep 1
        done
        set -- "$@" --address="$address"
    fi
    run ray start --block "$@" > "$log" 2>&1 & ray=$!
    until grep -qs "Ray runtime started" "$log"; do
        kill -0 "$ray" 2> /dev/null || give_up "Ray did not start on $SLURMD_NODENAME: $(tail -n 1 "$log")"
        sleep 1
    done
    echo "joined $SLURMD_NODENAME"
    until read -r -t 2 _ || [ "$?" -le 128 ] || ! kill -0 "$ray" 2> /dev/null; do :; done
    kill -TERM "$ray" 2> /dev/null
    wait "$ray"
    rm -rf "$temporary"
    exit 0
}
give_up() { echo "failed $SLURMD_NODENAME $1"; rm -rf "$temporary"; exit 0; }
export -f give_up run versions free_ports memory_options ray_node

# Starts Ray on all nodes of this job, and renders. "$@": what to do when Ray's head runs.
render() {
    local host ports answer node reason joined=() missing=() deadline=$((SECONDS + start_s))
    role='head' reach_s=$start_s RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
    host=$(own_address)
    [ -n "$host" ] || [ "$SLURM_NNODES${SLURM_ARRAY_JOB_ID:-}" != 1 ] || host=127.0.0.1
    [ -n "$host" ] || fail "$SLURMD_NODENAME has no address that other nodes reach: name their network with --interface"
    read -r -a ports <<< "$(free_ports)"
    address=$host:${ports[0]}
    RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    start_ray
    until [ "$((${#joined[@]} + ${#missing[@]}))" = "$SLURM_NNODES" ]; do
        read -r -t "$((deadline > SECONDS ? deadline - SECONDS : 1))" -u "$answers" answer node reason || break
        if [ "$answer" = joined ]; then joined+=("$node"); continue; fi
        missing+=("$node")
        say "$reason"
    done
    if [ -z "$stopped" ]; then
        [[ " ${joined[*]} " == *" $SLURMD_NODENAME "* ]] || bad_node "Ray did not start on $SLURMD_NODENAME"
        [ "${#joined[@]}" = "$SLURM_NNODES" ] || release_others "${joined[@]}"
        "$@"
        began=$(date +%s)
        run "${command[@]}" --address "$address" ${gpus:+--gpus "${#joined[@]}x$gpus"} & child=$!
        finish "$child"
        child=''
    else
        code=130
    fi
    end_ray
    wait "$nodes"
}

start_ray() {
    coproc ray { exec srun --kill-on-bad-exit=0 bash -c ray_node; }
    nodes=$ray_PID answers=${ray[0]}
}

# Gives the nodes back on which Ray does not run. "$@": the nodes of the job that stay.
release_others() {
    local gpus_per_node=${SLURM_GPUS_ON_NODE:-1} others
    others=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$(printf '%s\n' "$@")" | paste -sd, -)
    say "$(($# * gpus_per_node)) of $((SLURM_NNODES * gpus_per_node)) GPUs have joined. Ray does not run on $others: given back to Slurm"
    # Slurm writes a script for each shell into this folder.
    (cd "${TMPDIR:-/tmp}" && scontrol update JobId="$job" NodeList="$(IFS=,; echo "$*")" > /dev/null && rm -f "slurm_job_${SLURM_JOB_ID}_resize."*) ||
        say "$others stays allocated: Slurm does not make this job smaller. Submit it again with -- --exclude=$others"
}

# Waits for a process, also while signals arrive, and keeps its exit code.
finish() { while wait "$1"; code=$?; kill -0 "$1" 2> /dev/null; do :; done; }

# Queues the job again after the signal that Slurm sends before the time limit, if the next one would go further. After
# preemption, Slurm queues it.
leave() {
    local state
    state=$(scontrol show job "$job" 2> /dev/null)
    if [ "$stopped $1" != "limit 130" ] || [[ $state != *JobState=RUNNING*PreemptTime=None* ]]; then exit "$1"; fi
    if [ -z "$began" ] || ! has_finished_shots; then
        fail "time limit near, and no shot was finished since the start: not queued again. Submit again with a longer --time"
    fi
    say "time limit near: queued again"
    scontrol requeue "$job"
    exit "$1"
}
# Returns whether the run that has begun since then has finished a shot.
has_finished_shots() {
    run vidgen status --json "$out" 2> /dev/null | run python3 -c 'import datetime, json, sys
run = json.load(sys.stdin)["run"]
sys.exit(run["done"] == 0 or datetime.datetime.fromisoformat(run["started_at"]).timestamp() < int(sys.argv[1]))' "$began" 2> /dev/null
}

bad_node() { fail "$1. Leave this node out: -- --exclude=$SLURMD_NODENAME"; }
