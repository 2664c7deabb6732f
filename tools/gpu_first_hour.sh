#!/usr/bin/env bash
# First measurements on a machine with a GPU, the most valuable first. It needs Python, torch and numpy, with the bundle of
# tools/make_gpu_bundle.sh (python3 -m tarfile -e gpu-bundle.tar.xz FOLDER), or the environment of this project. No network.
#
#   tools/gpu_first_hour.sh all            # or some of: machine tests bench wan options upscaler swap
#
# Each step takes at most LIMIT_S seconds, default 540, and writes $OUT/NN-name.json after each measurement; run again, it
# measures what is missing. OUT: default out/first-hour. PROFILE: default auto; tiny on a CPU. Then: python3 -m tools.gpu_results
set -uo pipefail
[[ ${OUT:-/} = /* ]] || OUT=$PWD/$OUT
cd "$(dirname "$0")/.."
steps=(machine tests bench wan options upscaler swap)
out=${OUT:-out/first-hour} python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD:$PWD/site" VIDGEN_CACHE="${VIDGEN_CACHE:-$PWD/out/cache}"
"$python" -c "import torchvision" 2>/dev/null || PYTHONPATH+=":$PWD/if-missing"
(($#)) || { sed -n '2,10s/^# \?//p' "$0"; exit 2; }
[ "$1" = all ] && set -- "${steps[@]}"
mkdir -p "$out"
failed=0
for step; do
    number=0
    for n in "${!steps[@]}"; do [ "${steps[n]}" = "$step" ] && number=$((n + 1)); done
    ((number)) || { echo "got step $step, must be all or one of: ${steps[*]}" >&2; exit 2; }
    file=$(printf "%s/%02d-%s.json" "$out" "$number" "$step")
    begun=$SECONDS
    timeout --signal INT --kill-after 15 "${LIMIT_S:-540}" "$python" -m benchmarks.gpu_steps "$step" "$file" --profile "${PROFILE:-auto}" || failed=1
    echo "$step: $((SECONDS - begun)) s, $file" >&2
done
exit $failed
