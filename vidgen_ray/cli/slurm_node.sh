set -u
fail() { echo "vidgen: $1" >&2; exit 4; }
command -v srun > /dev/null || fail "no srun on $(hostname): submit this file with sbatch, outside of a container"
# Otherwise sbatch --export=NONE leaves steps without functions and variables.
export SLURM_EXPORT_ENV=ALL
export RAY_AUTH_MODE=token RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=$grace_s RAY_gcs_rpc_server_reconnect_timeout_s=15
export head_job=$SLURM_JOB_ID address found temporary RAY_AUTH_TOKEN

# All nodes need the same versions.
versions() { echo "$(run vidgen --version) with $(run python3 --version)"; }
same_versions() {
    [ "$(versions 2>&1)" = "$found" ] && return
    echo "vidgen: $(hostname) has vidgen $(versions 2>&1), the first node $found. Install it where all nodes see it, or use --container" >&2
    exit 4
}

free_port() { (run python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); }

# Runs Ray on a node, with ports of its own: other jobs may be on the same node.
ray_node() {
    set -- --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --include-log-monitor=false \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port="$(free_port)"
    if [ "$head_job" = "$SLURM_JOB_ID" ] && [ "$SLURM_NODEID" = 0 ]; then
        set -- "$@" --head --port="${address##*:}" --ray-client-server-port="$(free_port)" --include-dashboard=false \
            --temp-dir="$temporary"
    else
        set -- "$@" --address="$address"
    fi
    run ray start --block "$@" > /dev/null
}
export -f run versions same_versions free_port ray_node

# Starts Ray on all nodes of this job, and renders.
render() {
    address=$(run python3 -c 'import ray; print(ray.util.get_node_ip_address())'):$(free_port)
    temporary=/tmp/vidgen-$SLURM_JOB_ID-$RANDOM
    RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    srun --kill-on-bad-exit=0 bash -c ray_node & nodes=$!
    until (exec 3<> "/dev/tcp/${address%:*}/${address##*:}") 2> /dev/null; do
        kill -0 "$nodes" 2> /dev/null || fail "Ray did not start on $(hostname)"
        sleep 1
    done
    [ -z "$stopped" ] || return
    "$@"
    run "${command[@]}" --address "$address" & child=$!
    finish "$child"
    kill -TERM "$nodes"
    wait "$nodes"
    timeout 30 srun rm -rf "$temporary"
}

# Waits for a process, also while signals arrive, and keeps its exit code.
finish() { while wait "$1"; code=$?; kill -0 "$1" 2> /dev/null; do :; done; }

code=4 stopped= child=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' USR1
trap '[ -z "$child" ] || kill -TERM "$child"' TERM

# Queues the job again after the signal that Slurm sends before the time limit. After preemption, Slurm does so.
leave() {
    if [ -n "$stopped" ] && scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=None"; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$1"
}

problem=$(run vidgen --version 2>&1 > /dev/null) ||
    fail "vidgen does not run on $(hostname): ${problem##*$'\n'}. Install it, or Apptainer for --container, where all nodes see it"
found=$(versions 2>&1)
srun bash -c same_versions || exit 4
