#!/usr/bin/env bash
# Measure every claim of the paper on the bundled priors: train the models, measure them, draw the plots.
#
#     bash claims/run.sh              everything, in about five hours of one CPU core
#     bash claims/run.sh train        only train; two processes that run this share the models between them
#     bash claims/run.sh measure      only measure, and draw
#
# A command that was stopped goes on where it was when it is started again. Runs go to runs/claims/, results to
# claims/results/. SEEDS="0 1 2" chooses the seeds. The script needs Linux (flock) and matplotlib.
set -euo pipefail
shopt -s nullglob               # a pattern of file names that fits no file stands for nothing
cd "$(dirname "$0")/.."

runs=runs/claims
results=claims/results
v=toy/tiny-v.safetensors        # the two bundled priors: a v-network and an eps-network
eps=toy/tiny-eps.safetensors
seeds=${SEEDS:-0 1 2}
first=${seeds%% *}              # pictures are kept of the first seed only
what=${1:-all}

once() {        # once NAME COMMAND...: run the command, unless another process is running the one of this name
    mkdir -p "$runs/locks"
    ( flock -n 9 || exit 0; "${@:2}" ) 9> "$runs/locks/$1"
}

train_run() {   # train_run NAME OPTIONS...: train.py, unless the run is finished; a run that was begun goes on
    local out=$runs/$1
    if [ -e "$out/result.json" ]; then
        return
    elif [ -e "$out/state.safetensors" ]; then
        python train.py --resume "$out"
    else
        python train.py --out "$out" --precision bf16 --scenes 1024 --previews 4 --preview-every 50 --save-every 50 \
            "${@:2}"
    fi
}

reflow_run() {  # reflow_run SEED: sample the pairs by DDIM, and train on them
    if [ -e "$runs/reflow-$1/result.json" ]; then return; fi
    python sample.py --pairs 1024 --objective dm --cfg 4 --batch 64 --precision bf16 --seed "$1" --out "$runs/pairs-$1"
    train_run "reflow-$1" --task reflow --data "$runs/pairs-$1" --seed "$1" --steps 400 --lora small --lr 1e-3
}

judge_run() {   # judge_run NAME OPTIONS...: toy.judge, unless its results are there
    local out=$runs/measured/$1
    if compgen -G "$out/*.jsonl" > /dev/null; then return; fi
    python -m toy.judge "${@:2}" --precision bf16 --out "$out"
}

train() { once "$1" train_run "$@"; }
judge() { once "measure-$1" judge_run "$@"; }

train_all() {
    for seed in $seeds; do          # claims 1, 2, 3 and 6: a new style, by all weights and by LoRA
        for objective in dm fm fm-flip diff2flow; do
            train style-$objective-none-$seed --objective $objective --seed $seed --steps 200 --lora none --lr 5e-4
            for lora in base small; do
                train style-$objective-$lora-$seed --objective $objective --seed $seed --steps 200 \
                    --lora $lora --lr 2e-3
            done
        done
    done
    for seed in $seeds; do
        once reflow-$seed reflow_run $seed      # claim 8: Reflow
        for objective in dm fm fm-flip diff2flow; do
            # claim 9: depth
            train depth-$objective-none-$seed --task depth --objective $objective --seed $seed --steps 150 --keep \
                --lora none --lr 5e-4
            train depth-$objective-base-$seed --task depth --objective $objective --seed $seed --steps 150 --keep \
                --lora base --lr 1e-3
            # claims 6 and 7: from the eps-prior
            train eps-$objective-$seed --ckpt $eps --objective $objective --seed $seed --steps 100 --lora base --lr 2e-3
            # claim 4: another size
            train size-$objective-$seed --style solid --size 96 --batch 16 --objective $objective --seed $seed \
                --steps 100 --lora base --lr 2e-3
        done
        train depth-diff2flow-small-$seed --task depth --seed $seed --steps 150 --keep --lora small --lr 1e-3
        for rank in 2 8; do         # claim 3: the rank of the LoRA
            train rank-$rank-$seed --seed $seed --steps 200 --lora $rank --lr 2e-3
        done
    done
}

measure_all() {
    for seed in $seeds; do
        # claims 2, 3, 6 and 7: the new style
        judge style-$seed captions $runs/{style,eps,rank}-*-$seed/{model,lora}.safetensors \
            --style outline --cfg 1 --n 128 --seed $seed
        # claim 8: the prior, and after Reflow
        judge reflow-$seed captions $v $runs/reflow-$seed/lora.safetensors \
            --objective diff2flow --steps 25 4 2 1 --n 128 --seed $seed
        # claim 4: another size
        judge size-$seed captions $v $runs/size-*-$seed/lora.safetensors --size 96 --n 32 --seed $seed
        # claim 1: the priors before any training
        for objective in diff2flow fm fm-flip; do
            judge zero-$objective-$seed captions $v $eps --objective $objective --n 48 --seed $seed
        done
        # claim 5: DDIM at its own timesteps, and between them
        for shift in 0 0.5; do
            judge ddim-$shift-$seed captions $v --objective dm --t-shift $shift --n 128 --seed $seed
        done
        # claim 9: depth
        judge depth-$seed depth $runs/depth-*-$seed/{model,lora}-*.safetensors \
            --steps 2 10 --ensemble 1 4 --n 16 --seed $seed
    done
    judge plain-$first captions $runs/style-{dm,diff2flow}-none-$first/model.safetensors \
        $runs/eps-{dm,diff2flow}-$first/lora.safetensors --style outline --cfg 1 --n 48     # claim 6: black and white
}

write_results() {
    mkdir -p $results
    cat $runs/*/result.json > $results/training.jsonl
    for name in style reflow size zero ddim depth; do
        cat $runs/measured/$name-*/*.jsonl > $results/$name.jsonl
    done
    for name in style eps size; do
        python -m claims.report plot $runs/$name-*/validation.jsonl --words none="none (all weights)" \
            --out $results/$name.png
    done
    python -m claims.report plot $results/depth.jsonl --where ensemble=4 --y absrel="relative error (AbsRel)" \
        --panel steps run.lora=LoRA --words none="none (all weights)" --out $results/depth.png
    cp $runs/measured/plain-$first/samples.png $results/plain-samples.png
    cp $runs/measured/reflow-$first/samples.png $results/reflow-samples.png
    cp $runs/measured/size-$first/samples.png $results/size-samples.png
    cp $runs/depth-diff2flow-none-$first/before_after.png $results/depth-samples.png
}

if [ "$what" != measure ]; then
    train_all
fi
if [ "$what" != train ]; then
    measure_all
    write_results
fi
