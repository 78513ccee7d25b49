#!/usr/bin/env bash
# What each method learns where only the configuration's class differs from LoRA's, at three learning rates.
#   bash experiments/same_learning/run.sh DATA OUT STEPS [smollm2 | minilm MODEL] [OPTION …]
# DATA holds commonsense/ and glue/, STEPS is 30, 300 or 1000; further options go to dynalora compare, such as --seeds 1
# or --lrs 1e-3. Call it again to continue after a kill.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:?"give the folder with commonsense/ and glue/"}
out=${2:?"give a folder for the results"}
steps=${3:?"give the number of steps: 30, 300 or 1000"}
what=${4:-smollm2}
shift $(($# < 4 ? $# : 4))
case $what in
    smollm2) of_model=(--tasks "$data/commonsense/ARC-Easy") ;;
    minilm)
        of_model=(--model "${1:?"name the encoder"}" --data "$data")
        shift
        ;;
    *) echo "say smollm2 or minilm, not $what" >&2; exit 2 ;;
esac
dynalora compare --config "$here/$what.yaml" "${of_model[@]}" --steps "$steps" --output "$out/$what-$steps" "$@"
