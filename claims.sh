#!/usr/bin/env bash
# Every claim of the paper on the bundled priors: train the arms, measure them, draw the plots.
#
#     bash claims.sh                          all of it: about five hours of one CPU core; goes on where it was stopped
#     bash claims.sh train & bash claims.sh train & wait; bash claims.sh measure          two processes share the arms
#
# Runs go to runs/claims/, figures as JSON lines and plots to assets/results/. Takes bash, flock of Linux, and matplotlib.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")"
runs=runs/claims results=assets/results seeds=${SEEDS:-0 1 2} what=${1:-all}
recipe="--precision bf16 --steps 200 --scenes 1024 --previews 4 --preview-every 50 --save-every 50"

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
    compgen -G "$out/*.jsonl" > /dev/null || python evaluate.py "${@:2}" --precision bf16 --out "$out"
}

figures() { alone "measure-$1" measure "$@"; }

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
            for lora in none base small; do     # claim 9: depth
                if [ $lora = small ] && [ $objective != diff2flow ]; then continue; fi
                rate=$([ $lora = none ] && echo 5e-4 || echo 1e-3)
                arm depth-$objective-$lora-$seed $common --task depth --lora $lora --lr $rate --steps 150 --keep
            done
            arm eps-$objective-$seed $common --ckpt assets/tiny-eps.safetensors --steps 100             # claim 7: an eps-prior
            arm size-$objective-$seed $common --style solid --size 96 --batch 16 --steps 100            # claim 4: another size
        done
        for rank in 2 8; do                     # claim 3: the rank
            arm rank-$rank-$seed --lora $rank --seed $seed
        done
    done
fi
if [ "$what" != train ]; then
    v=assets/tiny-v.safetensors eps=assets/tiny-eps.safetensors
    for seed in $seeds; do
        figures style-$seed captions $runs/{style,eps,rank}-*-$seed/{model,lora}.safetensors \
            --style outline --cfg 1 --n 128 --seed $seed
        figures reflow-$seed captions $v $runs/reflow-$seed/lora.safetensors \
            --objective diff2flow --steps 25 4 2 1 --n 128 --seed $seed
        figures size-$seed captions $v $runs/size-*-$seed/lora.safetensors --size 96 --n 32 --seed $seed
        for objective in diff2flow fm fm-flip; do   # claim 1: before any training
            figures zero-$objective-$seed captions $v $eps --objective $objective --n 48 --seed $seed
        done
        for shift in 0 0.5; do                      # claim 5: DDIM at fractional timesteps
            figures ddim-$shift-$seed captions $v --objective dm --t-shift $shift --n 128 --seed $seed
        done
        figures depth-$seed depth-scenes $runs/depth-*-$seed/{model,lora}-*.safetensors \
            --steps 2 10 --ensemble 1 4 --n 16 --seed $seed
    done
    first=${seeds%% *}                              # of which pictures are kept
    figures plain-$first captions $runs/style-{dm,diff2flow}-none-$first/model.safetensors \
        $runs/eps-{dm,diff2flow}-$first/lora.safetensors --style outline --cfg 1 --n 48             # claim 6: pictures
    mkdir -p $results
    cat $runs/*/result.json > $results/training.jsonl
    for name in style reflow size zero ddim depth; do cat $runs/measured/$name-*/*.jsonl > $results/$name.jsonl; done
    for name in style eps size; do python evaluate.py plot $runs/$name-*/validation.jsonl --out $results/$name.png; done
    python evaluate.py plot $results/depth.jsonl --y absrel --panel run.lora steps --where ensemble=4 \
        --out $results/depth.png
    cp $runs/measured/plain-$first/samples.png $results/plain-samples.png
    for name in reflow size; do cp $runs/measured/$name-$first/samples.png $results/$name-samples.png; done
    cp $runs/depth-diff2flow-none-$first/before_after.png $results/depth-samples.png
fi
