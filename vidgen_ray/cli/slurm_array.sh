# The first task runs Ray's head and renders; the others join it. When head N has ended, one of them becomes head N + 1.
run_folder=$folder/.slurm-$SLURM_ARRAY_JOB_ID
# Only its owner may read the token.
(umask 077 && mkdir -p "$run_folder")
n=1 is_head=''
trap '[ -z "$is_head" ] || : > "$run_folder/ended.$n"' EXIT
announce() { echo "$address $RAY_AUTH_TOKEN $found" > "$run_folder/new.$n" && mv "$run_folder/new.$n" "$run_folder/address.$n"; }
settle() { echo "$1" > "$run_folder/done" && scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; }

# Gives this task back to the queue, without this node: it would end one task after another. At most twice.
bad_node() {
    local excluded tried=$run_folder/bad.$SLURM_ARRAY_TASK_ID
    say "$1. This task leaves the node"
    echo "$SLURMD_NODENAME" >> "$tried"
    excluded=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^( ]*\).*/\1/p')
    [ "$(wc -l < "$tried")" -le 2 ] || exit 4
    # Slurm ends this script meanwhile.
    trap '' TERM
    scontrol requeue "$job" || exit 4
    until scontrol update JobId="$job" ExcNodeList="${excluded:+$excluded,}$SLURMD_NODENAME"; do sleep 1; done
    exit 4
}

# Asks Slurm three times: it may be busy.
head_is_gone() {
    local head_job=$1 listed
    for _ in 1 2 3; do
        sleep $((5 + RANDOM % 10))
        if listed=$(squeue --noheader --states=RUNNING,SUSPENDED --jobs="$head_job" --format=%i 2>&1); then
            [ -z "$listed" ] || return 1
        elif [[ $listed != *"Invalid job id"* ]]; then
            return 1
        fi
    done
}

become_head() {
    is_head=1
    render announce
    case $code in
        [01235]) settle "$code" ;;
        4) # Another node may do better, but not a third.
            if [ -n "$began" ] && ! has_finished_shots; then echo "$SLURMD_NODENAME" >> "$run_folder/failed"; fi
            if [ "$(wc -l 2> /dev/null < "$run_folder/failed")" = 2 ]; then
                say "two tasks have failed before a shot was finished: the array ends"
                settle 4
            fi ;;
    esac
    leave "$code"
}

join() {
    read -r address RAY_AUTH_TOKEN found < "$run_folder/address.$n"
    role=member reach_s=15 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=$grace_s began=1
    start_ray
    read -r answer _ reason <&"$answers"
    finish "$nodes"
}
is_over() { [ -e "$run_folder/done" ] || [ -n "$stopped" ]; }

found=$(versions 2>&1) ||
    bad_node "vidgen does not run on $SLURMD_NODENAME: ${found##*$'\n'}. Install it, or Apptainer for --container, where all nodes see it"
ask_at=$((SECONDS + 60 + RANDOM % 60))
until is_over; do
    while [ -L "$run_folder/head.$((n + 1))" ]; do n=$((n + 1)); done
    # On a node that has failed, let others try first.
    if grep -qsx "$SLURMD_NODENAME" "$run_folder/failed" && [ ! -L "$run_folder/head.$n" ]; then sleep 30; fi
    ln -sT "$job" "$run_folder/head.$n" 2> /dev/null && become_head
    # Network file systems may show it later.
    head_job=$(readlink "$run_folder/head.$n" || { sleep 30; readlink "$run_folder/head.$n"; }) || fail "cannot write to $run_folder"
    # A job that was queued again is no head any more.
    if [ -e "$run_folder/ended.$n" ] || [ "$head_job" = "$job" ]; then
        n=$((n + 1))
        continue
    fi
    answer=''
    if [ -e "$run_folder/address.$n" ]; then
        join
    elif [ "$SECONDS" -lt "$ask_at" ]; then
        sleep 2
        continue
    fi
    ask_at=$((SECONDS + 60 + RANDOM % 60))
    if is_over || [ -e "$run_folder/ended.$n" ]; then continue; fi
    if head_is_gone "$head_job"; then
        : > "$run_folder/ended.$n"
    elif [ "$answer" = failed ]; then
        bad_node "$reason"
    fi
done
[ -z "$stopped" ] || leave 130
exit 0
