#!/usr/bin/env bash
# Every claim of the paper on the bundled priors: train the arms, measure them, draw the plots.
#
#     bash claims.sh                                  all of it: a night on two CPU cores; goes on where it was stopped
#     bash claims.sh train & bash claims.sh train & wait; bash claims.sh measure      two processes share the arms
#
# Runs go to runs/claims/, figures as JSON lines and plots to assets/results/. Takes bash, and flock of Linux.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")"
runs=runs/claims results=assets/results seeds=${SEEDS:-0 1 2} what=${1:-all}
recipe="--precision bf16 --steps 200 --scenes 1024 --previews 4 --preview-every 50"

alone() {  # alone NAME COMMAND...: unless another process has begun it
    mkdir -p "$runs/locks"
    ( flock -n 9 || exit 0; "${@:2}" ) 9> "$runs/locks/$1"
}

train() {  # train NAME OPTIONS: a run of train.py, unless it is there
    local out=$runs/$1
    if [ -e "$out/result.json" ]; then return; fi
    if [ -e "$out/state.safetensors" ]; then python train.py --resume "$out"; return; fi
    python train.py $recipe --out "$out" "${@:2}"
}

reflow() {  # reflow SEED: pairs, and a run on them
    local pairs=$runs/pairs-$1
    if [ -e "$runs/reflow-$1/result.json" ]; then return; fi
    python sample.py --pairs 1024 --cfg 4 --batch 64 --precision bf16 --seed "$1" --out "$pairs"
    train "reflow-$1" --task reflow --data "$pairs" --seed "$1" --steps 400
}

arm() { alone "$1" train "$@"; }

measure() {  # measure NAME COMMAND MODELS OPTIONS: evaluate.py, unless its figures are there
    local out=$runs/measured/$1
    shift
    compgen -G "$out/*.jsonl" > /dev/null || python evaluate.py "$@" --out "$out"
}

if [ "$what" != measure ]; then
    for seed in $seeds; do
        for objective in dm fm fm-flip diff2flow; do
            common="--objective $objective --seed $seed"
            for lora in none base small; do     # claims 1, 2, 3, 6: another style
                rate=$([ $lora = none ] && echo 5e-4 || echo 2e-3)
                arm style-$objective-$lora-$seed $common --lora $lora --lr $rate
            done
        done
    done
    for seed in $seeds; do
        alone reflow-$seed reflow $seed         # claim 8: Reflow
        for objective in dm fm fm-flip diff2flow; do
            common="--objective $objective --seed $seed"
            for lora in none base; do           # claim 9: depth
                rate=$([ $lora = none ] && echo 5e-4 || echo 1e-3)
                arm depth-$objective-$lora-$seed $common --task depth --lora $lora --lr $rate --save-every 50 --keep
            done
            arm eps-$objective-$seed $common --ckpt assets/tiny-eps.safetensors                         # claim 7: an eps-prior
            arm size-$objective-$seed $common --style solid --size 96 --batch 16 --steps 150            # claim 4: another size
        done
        for rank in 2 8 32; do                  # claim 3: the rank
            arm rank-$rank-$seed --lora $rank --seed $seed
        done
    done
fi
if [ "$what" != train ]; then
    mkdir -p $results
    prior=assets/tiny-v.safetensors
    measure zero captions $prior --objective diff2flow                                  # claim 1
    measure zero-fm captions $prior --objective fm
    measure zero-fm-flip captions $prior --objective fm-flip
    measure ddim captions $prior                                                        # claim 5
    measure ddim-half captions $prior --t-shift 0.5
    measure style captions $runs/style-*/{model,lora}.safetensors --style outline --n 256       # claims 2, 3, 6
    measure rank captions $runs/rank-*/lora.safetensors --style outline --n 256
    measure reflow captions $prior $runs/reflow-*/lora.safetensors --steps 25 4 2 1 --objective diff2flow  # claim 8
    measure depth depth-scenes $runs/depth-*/{model,lora}-*.safetensors --steps 2 10 --ensemble 1 4        # claim 9
    cat $runs/*/result.json > $results/training.jsonl
    for folder in $runs/measured/*; do cat "$folder"/*.jsonl > $results/"$(basename "$folder")".jsonl; done
    python evaluate.py plot $runs/style-*/validation.jsonl --out $results/style.png
    python evaluate.py plot $runs/size-*/validation.jsonl --out $results/size.png
    python evaluate.py plot $results/depth.jsonl --y absrel --panel run.lora steps ensemble --out $results/depth.png
fi
