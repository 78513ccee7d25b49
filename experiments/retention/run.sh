#!/usr/bin/env bash
# Fine-tune on GSM8K with LoRA and DISeL at three ranks, following how far each moves from the base model; then on which text
# DISeL's gates open.
#   bash experiments/retention/run.sh DATA OUT [METHOD-RANK …]
# DATA holds math/, code/ and text/; OUT gets a run folder per method and rank. Call it again to continue after a kill.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:?"give the folder with math/, code/ and text/"}
out=${2:?"give a folder for the results"}
shift 2
[ $# -gt 0 ] || set -- lora-8 disel-8 lora-32 disel-32 lora-64 disel-64
mkdir -p "$out"

for name in "$@"; do
    folder=$out/$name
    if grep -qs '"finished": "' "$folder/run.json"; then
        echo "$folder is finished."
        continue
    fi
    options=()
    # The paper's form, which the default was when results/ was made.
    [[ $name != disel-* ]] || options=(--option match_step=false)
    resume=()
    [ ! -e "$folder/run.json" ] || resume=(--resume)
    dynalora finetune --config "$here/train.yaml" --method "${name%-*}" --rank "${name#*-}" "${options[@]}" \
        --data "$data/math/gsm8k.train.jsonl.gz" --monitor-text "WikiText=$data/text/wikitext2.valid.txt.gz" \
        --output "$folder" "${resume[@]}"
done

for name in "$@"; do
    gates=$out/$name-gates
    case $name in
        disel-*)
            [ -e "$gates/report.html" ] && continue
            sed "s|DATA|$data|" "$here/gates.yaml" > "$out/gates.yaml"
            dynalora gates "$out/$name" --config "$out/gates.yaml" --output "$gates"
            ;;
    esac
done
python "$here/table.py" "$out"
