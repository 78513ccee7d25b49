#!/usr/bin/env bash
# Three stages ARC-Easy → GSM8K → ARC-Easy with DiRA and with LoRA, then recovery of ARC-Easy from 8 examples.
#   bash experiments/forgetting/run.sh DATA OUT [METHOD …]
# DATA holds commonsense/ and math/; OUT gets two run folders per method. Call it again to continue after a kill.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:?"give the folder with commonsense/ and math/"}
out=${2:?"give a folder for the results"}
shift 2
[ $# -gt 0 ] || set -- dira lora

# Start a run, continue one that was killed, leave a finished one alone.
run() {
    local folder=$1
    shift
    if grep -qs '"finished": "' "$folder/run.json"; then
        echo "$folder is finished."
    elif [ -e "$folder/run.json" ]; then
        "$@" --output "$folder" --resume
    else
        "$@" --output "$folder"
    fi
}

# After so short a training no singular value is below the paper's 0.001, and RLGR would zero nothing. These thresholds
# make a fifth (dira) and a quarter (lora) of the 210 matrices low-rank after the first stage.
tau() {
    case $1 in lora) echo 0.1 ;; *) echo 0.05 ;; esac
}

for method in "$@"; do
    run "$out/$method" dynalora forgetting --config "$here/stages.yaml" --method "$method" \
        --task-a "$data/commonsense/ARC-Easy" --task-b "$data/math/gsm8k"
    run "$out/$method-recovery" dynalora recover "$out/$method" --config "$here/recovery.yaml" \
        --tau "$(tau "$method")"
done
