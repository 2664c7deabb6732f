# The first task runs Ray's head and renders; the others join it. If it ends early, one of them takes its place.
run_folder=$folder/.slurm-$SLURM_ARRAY_JOB_ID
# Only its owner may read the token.
(umask 077 && mkdir -p "$run_folder")
announce() { echo "$address $RAY_AUTH_TOKEN" > "$run_folder/new" && mv "$run_folder/new" "$run_folder/head/address"; }
until [ -e "$run_folder/done" ] || [ -n "$stopped" ]; do
    if mkdir "$run_folder/head" 2> /dev/null; then
        echo "$SLURM_JOB_ID" > "$run_folder/head/job"
        head_job=$SLURM_JOB_ID
        render announce
        case $stopped$code in [01235]) echo "$code" > "$run_folder/done" && scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" ;; esac
        rm -rf "$run_folder/head"
        leave "$code"
    fi
    head_job=$(cat "$run_folder/head/job" 2> /dev/null)
    if read -r address RAY_AUTH_TOKEN 2> /dev/null < "$run_folder/head/address"; then
        srun bash -c ray_node & child=$!
        finish "$child"
        child=
    fi
    # The task of the head may have been killed.
    if [ -n "$head_job" ] && [ -z "$(squeue --noheader --states=RUNNING --jobs="$head_job" 2> /dev/null)" ]; then
        mv -T "$run_folder/head" "$run_folder/head-$head_job" 2> /dev/null
    fi
    sleep 2
done
leave 0
