#!/usr/bin/env bash
# The four methods and PEFT's against LoRA: SmolLM2 on ARC-Easy and OpenBookQA, MiniLM on CoLA and SST-2.
#   bash experiments/compare/run.sh DATA OUT [smollm2 | minilm MODEL | ranks MODEL | frontier | retain TASK | retain-methods | papers] [OPTION …]
# frontier: SmolLM2 on ARC-Easy with LoRA at three ranks, seed 0; the cells of smollm2/ that it shares can be copied.
# retain: LoRA with `retain` and its rivals on ARC-Easy, gsm8k or family_relationships, every run along factors of its update.
# retain-methods: the four methods with and without it, and further rivals, on ARC-Easy.
# ranks: budgets of ranks, ranks that move and ranks that a short run found, against the same rank everywhere; MiniLM on SST-2.
# papers: the seven other methods of the papers' tables, on ARC-Easy.
# DATA holds commonsense/, glue/, math/ and text/; MODEL is all-MiniLM-L6-v2, a Hub id or a folder. Call it again to continue after a
# kill, or at the same time to share the work.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:?"give the folder with commonsense/, glue/, math/ and text/"}
out=${2:?"give a folder for the results"}
which=${3:?"say smollm2, minilm, ranks, frontier, retain, retain-methods or papers"}
shift 3
case $which in
    smollm2)
        dynalora compare --config "$here/smollm2.yaml" --text "WikiText=$data/text/wikitext2.valid.txt.gz" \
            --tasks "$data/commonsense/ARC-Easy,$data/commonsense/openbookqa" --output "$out/smollm2" "$@"
        ;;
    minilm)
        model=${1:?"name the encoder"}
        shift
        dynalora compare --config "$here/minilm.yaml" --model "$model" --data "$data" --output "$out/minilm" "$@"
        ;;
    ranks)
        model=${1:?"name the encoder"}
        shift
        mkdir -p "$out"
        python "$here/pattern.py" "$here/ranks.yaml" > "$out/ranks-first.yaml"
        dynalora compare --config "$out/ranks-first.yaml" --model "$model" --data "$data" --output "$out/ranks-first"
        python "$here/pattern.py" "$here/ranks.yaml" "$out"/ranks-first/cells/sst2/dira_*.json > "$out/ranks.yaml"
        dynalora compare --config "$out/ranks.yaml" --model "$model" --data "$data" --output "$out/ranks" "$@"
        ;;
    retain)
        task=${1:?"name the task: ARC-Easy, gsm8k or family_relationships"}
        shift
        case $task in
            ARC-Easy) of_task=(--tasks "$data/commonsense/ARC-Easy") ;;
            gsm8k) of_task=(--tasks "$data/math/gsm8k" --max-length 200 --held-out 60 --validation 20) ;;
            family_relationships) of_task=(--tasks family_relationships) ;; # reasoning-gym makes it
            *) echo "say ARC-Easy, gsm8k or family_relationships, not $task" >&2; exit 2 ;;
        esac
        dynalora compare --config "$here/retain.yaml" --text "WikiText=$data/text/wikitext2.valid.txt.gz" \
            "${of_task[@]}" --output "$out/retain-$task" "$@"
        ;;
    frontier | retain-methods | papers)
        dynalora compare --config "$here/$which.yaml" --text "WikiText=$data/text/wikitext2.valid.txt.gz" \
            --tasks "$data/commonsense/ARC-Easy" --output "$out/$which" "$@"
        ;;
    *) echo "say smollm2, minilm, ranks, frontier, retain, retain-methods or papers, not $which" >&2; exit 2 ;;
esac
