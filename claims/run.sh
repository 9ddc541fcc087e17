#!/usr/bin/env bash
# Measure every claim of the paper on the bundled priors: train the models, measure them, draw the plots.
#
#     bash claims/run.sh              everything: about 70 hours of one CPU core, or 45 minutes of an H100 (estimates)
#     bash claims/run.sh style        a part, or several of: rates priors style size reflow depth weights draw
#
# A run trains one model, measures it on scenes that are the same for all runs, and writes the results to
# claims/results/CLAIM/RUN.jsonl. Runs with results are skipped: re-run the command to resume, also on another computer.
# Start it several times to share the runs, best once per core with OMP_NUM_THREADS=1, on a GPU under MPS
# (nvidia-cuda-mps-control -d). A run that needs a learning rate first does that part of the sweep. Files of training go
# to runs/claims/.
# SEEDS="1 2" and LORAS=base choose the seeds and what is trained. The script needs Linux (flock), matplotlib and scipy.
set -euo pipefail
cd "$(dirname "$0")/.."
export NVIDIA_TF32_OVERRIDE=0   # no TF32: convolutions in full float32 on a GPU too

runs=runs/claims
results=claims/results
seeds=${SEEDS:-1 2 3 4 5}
loras=${LORAS:-base none}
few="1 2"                       # seeds of runs that are expensive, or clearly worse
three="1 2 3"                   # seeds of expensive runs that need an interval
sweep_seed=0                    # of the learning-rate sweep alone
precision=fp32                  # of training and sampling: the same for all runs, on every computer

prior() { echo toy/tiny-$1.safetensors; }       # prior v, or prior eps

is_one_of() { [[ " $2 " = *" $1 "* ]]; }        # is_one_of WORD WORDS

extra() { if [ $1 = base ]; then echo $three; else echo $few; fi; }    # seeds of fm, and of other ways to sample

locked() {      # locked SECONDS CLAIM/RUN FUNCTION OPTIONS...: see once
    if [ -e "$results/$2.jsonl" ]; then return; fi
    mkdir -p "$runs/locks" "$results/${2%/*}"
    ( flock -w $1 9 || exit 0
      if [ ! -e "$results/$2.jsonl" ]; then "$3" "$2" "${@:4}"; fi ) 9> "$runs/locks/${2//\//-}"
}

once() { locked 0 "$@"; }               # once CLAIM/RUN FUNCTION OPTIONS...: FUNCTION CLAIM/RUN OPTIONS..., unless it
                                        # is done, or another process has begun it
wait_for() { locked 86400 "$@"; }       # the same, but waits for that process

train() {       # train CLAIM/RUN OPTIONS...: train.py, or $trainer; resumes a run that was stopped
    local out=$runs/$1
    if [ -e "$out/result.json" ]; then
        return
    elif [ -e "$out/state.safetensors" ]; then
        python ${trainer:-train.py} --resume "$out"
    else
        python ${trainer:-train.py} --out "$out" --precision $precision --batch 32 --scenes 4096 --validation 128 \
            --previews 4 --save-every 100 "${@:2}"
    fi
}

weights() { echo "$runs/$1"/*.safetensors | tr ' ' '\n' | grep -E '/(lora|model)\.safetensors$'; }

classifier() {  # classifier STYLE: toy.judge trains it at its first use, in one process alone
    local file=runs/classifier-$1.safetensors
    ( flock 9; [ -e $file ] || python -m toy.judge captions --style $1 --n 2 --steps 1 --out $runs/classifier ) \
        9> $runs/locks/classifier-$1
}

judge() {       # judge CLAIM/RUN COMMAND MODEL OPTIONS...: toy.judge; its rows stay in the run's folder
    local rows="$runs/$1/judged-$(echo "${@:2}" | cksum | cut -d' ' -f1)"
    if [ $2 = captions ]; then
        if [[ " $* " = *" --style outline "* ]]; then classifier outline; else classifier solid; fi
    fi
    [ -e "$rows/$2.jsonl" ] || python -m toy.judge "${@:2}" --precision $precision --out "$rows"
}

save() {        # save CLAIM/RUN FILES...: write the files as its results, atomically
    cat "${@:2}" > "$results/$1.partial"
    mv "$results/$1.partial" "$results/$1.jsonl"
}

save_run() {    # save_run CLAIM/RUN: write its measurements and its training curve as its results
    local line run
    run=$(cat "$runs/$1/result.json")
    while read -r line; do echo "{\"run\": $run, ${line#\{}"; done < "$runs/$1/validation.jsonl" > "$runs/$1/curve.jsonl"
    save $1 "$runs/$1"/judged-*/*.jsonl "$runs/$1/curve.jsonl"
}

keep() { if [ -e "$2" ]; then cp "$2" "$results/$1"; fi; }  # keep NAME PICTURE: copy it to results/, if it exists

# ------------------------------------------------------------------ the learning rates

rate_run() {    # rate_run NAME PRIOR LORA OBJECTIVE RATE
    train $1 --ckpt $(prior $2) --lora $3 --objective $4 --lr $5 --seed $sweep_seed --steps 300 --scenes 1024 \
        --preview-every 0
    save $1 $runs/$1/result.json
}

rates_of() { if [ $1 = none ]; then echo 5e-4 1e-3 2e-3 4e-3; else echo 2e-3 4e-3 8e-3 1.6e-2; fi; }

sweep() {       # sweep PRIOR LORA OBJECTIVE: measure its four rates, first those that no other process has begun
    local rate how
    for how in once wait_for; do for rate in $(rates_of $2); do
        $how rates/$1-$2-$3-$rate rate_run $1 $2 $3 $rate
    done; done
}

best_rate() {   # best_rate PRIOR LORA OBJECTIVE: after its sweep
    local stable=()
    if [ "$1 $2" = "v base" ]; then stable=(lr="0.002|0.004"); fi       # 8e-3, best for 300 steps, is unstable later
    python -m claims.report best $results/rates --where prediction=$1 lora=$2 objective=$3 "${stable[@]}" --by lr \
        --of velocity_error_after
}

all_rates() {
    for lora in $loras; do for prior in v eps; do for objective in diff2flow dm fm-flip fm; do
        for rate in $(rates_of $lora); do
            once rates/$prior-$lora-$objective-$rate rate_run $prior $lora $objective $rate
        done
    done; done; done
}

# ------------------------------------------------------------------ claims 1 and 5: the priors before any training

prior_run() {   # prior_run NAME PRIOR COMMAND OPTIONS...
    judge $1 $3 $(prior $2) "${@:4}"
    save $1 $runs/$1/judged-*/*.jsonl
}

all_priors() {
    for prior in v eps; do
        for objective in diff2flow dm fm fm-flip; do
            once priors/$prior-$objective prior_run $prior captions --objective $objective
        done
        once priors/$prior-between prior_run $prior captions --objective dm --t-shift 0.5
        once priors/$prior-plain prior_run $prior plain
    done
}

# ------------------------------------------------------------------ claims 2, 3, 6 and 7: a new style

style_run() {   # style_run NAME PRIOR LORA OBJECTIVE SEED
    sweep $2 $3 $4
    train $1 --ckpt $(prior $2) --lora $3 --objective $4 --seed $5 --steps 1600 --preview-every 200 \
        --lr $(best_rate $2 $3 $4)
    local model=$(weights $1) sampler
    judge $1 velocity $model --style outline
    judge $1 plain $model --cfg 1
    judge $1 captions $model --style outline --cfg 1 --steps 25 10 4
    if is_one_of $5 "$(extra $3)"; then
        judge $1 captions $model --style outline --cfg 3
        for sampler in diff2flow dm; do         # also by the other's sampler
            if [ $4 != $sampler ] && is_one_of $4 "diff2flow dm"; then
                judge $1 captions $model --style outline --cfg 1 --steps 25 10 4 --objective $sampler
                judge $1 plain $model --cfg 1 --objective $sampler
            fi
        done
    fi
    save_run $1
}

style_picture() {   # style_picture PRIOR: seed 1 by each objective, from the same noise, if they are on this computer
    local objective models=()
    for objective in dm fm-flip diff2flow; do
        if [ ! -e $runs/style/$1-base-$objective-1/lora.safetensors ]; then return; fi
        models+=($runs/style/$1-base-$objective-1/lora.safetensors)
    done
    if [ -e $results/style-$1.png ]; then return; fi
    python -m toy.judge captions "${models[@]}" --style outline --cfg 1 --n 8 --precision $precision \
        --out $runs/picture-$1
    if [ $1 = eps ]; then                       # for the v-prior all draw true black and white
        python -m toy.judge plain "${models[@]}" --cfg 1 --n 4 --precision $precision --out $runs/picture-plain
        cp $runs/picture-plain/samples.png $results/plain-eps.png
    fi
    cp $runs/picture-$1/samples.png $results/style-$1.png
}

all_styles() {
    for seed in $seeds; do for lora in $loras; do for prior in v eps; do for objective in diff2flow dm fm-flip; do
        once style/$prior-$lora-$objective-$seed style_run $prior $lora $objective $seed
    done; done; done; done
    for seed in $seeds; do for lora in $loras; do for prior in v eps; do
        if is_one_of $seed "$(extra $lora)"; then
            once style/$prior-$lora-fm-$seed style_run $prior $lora fm $seed
        fi
    done; done; done
    for prior in v eps; do style_picture $prior; done
}

# ------------------------------------------------------------------ claim 4: another size of picture

size_run() {    # size_run NAME LORA OBJECTIVE SIZE SEED
    sweep v $2 $3
    train $1 --style solid --lora $2 --objective $3 --size $4 --batch 16 --seed $5 --steps 1000 --preview-every 0 \
        --lr $(best_rate v $2 $3)
    judge $1 velocity $(weights $1) --n 128
    judge $1 captions $(weights $1) --n 128 --cfg 4
    save_run $1
}

all_sizes() {
    local size some
    for size in 96 128; do
        once size/$size-prior prior_run v captions --size $size --n 128
        for seed in $seeds; do for lora in $loras; do for objective in diff2flow dm fm-flip fm; do
            some=$few                   # at 128 three where claim 4 needs an interval
            if [ $size = 96 ] || is_one_of $lora-$objective "base-diff2flow base-dm"; then some=$three; fi
            if is_one_of $seed "$some"; then
                once size/$size-$lora-$objective-$seed size_run $lora $objective $size $seed
            fi
        done; done; done
    done
    for name in 128-prior 128-base-diff2flow-1; do keep size-$name.png $runs/size/$name/judged-*/samples.png; done
}

# ------------------------------------------------------------------ claim 8: Reflow once and twice

pairs() {       # pairs NAME N OPTIONS OF SAMPLE.PY...: N pairs in runs/claims/pairs/NAME, made by one process
    mkdir -p $runs/locks
    ( flock 9
      python sample.py --pairs $2 --batch 64 --precision $precision --out $runs/pairs/$1 "${@:3}"
    ) 9> $runs/locks/pairs-$1
}

reflow() {      # reflow NAME SEED GUIDANCE: train on pairs of the prior, which are the same for all seeds
    pairs cfg$3 8192 --objective dm --steps 40 --cfg $3 --seed 1
    train $1 --task reflow --data $runs/pairs/cfg$3 --seed $2 --steps 1500 --preview-every 0
}

reflow_run() {  # reflow_run NAME SEED GUIDANCE
    reflow $1 $2 $3
    judge $1 captions $(weights $1) --steps 25 4 2 1
    save_run $1
}

again_run() {   # again_run NAME SEED: train the prior on pairs of the first model
    local first=reflow/cfg4-$2
    reflow $first $2 4
    pairs again-$2 8192 --lora $(weights $first) --steps 25 --cfg 1 --seed 2
    train $1 --task reflow --data $runs/pairs/again-$2 --seed $2 --steps 1500 --preview-every 0
    judge $1 captions $(weights $1) --steps 25 4 2 1
    save_run $1
}

all_reflows() {
    once reflow/prior prior_run v captions --objective diff2flow --steps 25 4 2 1
    for seed in $seeds; do
        if is_one_of $seed "$three"; then once reflow/cfg4-$seed reflow_run $seed 4; fi
        if is_one_of $seed "$few"; then once reflow/cfg1-$seed reflow_run $seed 1; fi
    done
    for seed in $seeds; do
        if is_one_of $seed "$three"; then
            wait_for reflow/cfg4-$seed reflow_run $seed 4
            once reflow/again-$seed again_run $seed
        fi
    done
    once solvers/reflow-1 solvers_run
    for name in prior cfg4-1 again-1; do keep reflow-$name.png $runs/reflow/$name/judged-*/samples.png; done
}

solvers_run() { # solvers_run NAME: Euler, midpoint and Heun, before and after a Reflow of a quarter of the pairs and steps
    pairs short 2048 --objective dm --steps 20 --cfg 4 --seed 1
    train $1 --task reflow --data $runs/pairs/short --seed 1 --steps 400 --preview-every 0
    python -m claims.solvers $(prior v) $(weights $1) --precision $precision --out $runs/$1/judged
    save $1 $runs/$1/judged/captions.jsonl
}

# ------------------------------------------------------------------ claim 9: depth

depth_run() {   # depth_run NAME PRIOR OBJECTIVE SEED
    sweep $2 none $3
    train $1 --task depth --ckpt $(prior $2) --objective $3 --seed $4 --steps 600 --preview-every 0 --lora none \
        --lr $(best_rate $2 none $3)
    judge $1 depth $(weights $1) --steps 1 2 4 10 --ensemble 1 4 --n 96
    save_run $1
}

all_depths() {
    for seed in $seeds; do for prior in v eps; do for objective in diff2flow dm fm-flip fm; do
        once depth/$prior-$objective-$seed depth_run $prior $objective $seed
    done; done; done
    keep depth-samples.png $runs/depth/v-diff2flow-1/before_after.png
}

# ------------------------------------------------------------------ which weights for an eps-network?

sampler_of() {  # sampler_of OBJECTIVE: by which a model that was trained by it is sampled
    if [ $1 = min-snr ]; then echo dm; elif is_one_of $1 "dm fm-flip rf"; then echo $1; else echo diff2flow; fi
}

weights_train() {   # weights_train NAME PRIOR LORA OBJECTIVE SEED OPTIONS...: a third of style_run's steps, of 16 pictures
    local rate=4e-3 trainer="-m claims.weighted"
    if [ $3 = none ]; then rate=2e-3; fi
    train $1 --ckpt $(prior $2) --lora $3 --objective $4 --seed $5 --steps 540 --batch 16 --scenes 1024 \
        --lr $rate --preview-every 0 "${@:6}"
}

weights_run() { # weights_run NAME PRIOR LORA OBJECTIVE SEED: a new style
    weights_train "$@"
    local model=$(weights $1) sampler=$(sampler_of $4)
    judge $1 velocity $model --style outline --objective $sampler
    judge $1 plain $model --cfg 1 --steps 10 --objective $sampler
    judge $1 captions $model --style outline --cfg 1 --steps 10 4 --objective $sampler
    save $1 $runs/$1/judged-*/*.jsonl
}

weights_depth_run() {   # weights_depth_run NAME PRIOR OBJECTIVE SEED
    weights_train $1 $2 none $3 $4 --task depth
    judge $1 depth $(weights $1) --steps 2 10 --ensemble 4 --n 96 --objective $(sampler_of $3)
    save $1 $runs/$1/judged-*/*.jsonl
}

all_weights() {
    local prior lora objective objectives
    for prior in eps v; do for seed in $seeds; do for lora in $loras; do
        objectives="diff2flow dm fm-flip rf"
        if [ $prior = eps ]; then objectives+=" p1 c5 min-snr p2 c20"; fi
        for objective in $objectives; do
            once weights/$prior-$lora-$objective-$seed weights_run $prior $lora $objective $seed
        done
    done; done; done
    for seed in $seeds; do for prior in eps v; do
        objectives="diff2flow dm fm-flip rf"
        if [ $prior = eps ]; then objectives+=" c20"; fi
        for objective in $objectives; do
            once weights-depth/$prior-$objective-$seed weights_depth_run $prior $objective $seed
        done
    done; done
}

# ------------------------------------------------------------------ the figures

draw() {        # the figures and tables of claims/README.md
    python -m claims.weights
    python -m claims.page
}

for what in ${@:-rates priors style size reflow depth weights draw}; do
    case $what in
        rates) all_rates ;; priors) all_priors ;; style) all_styles ;; size) all_sizes ;; reflow) all_reflows ;;
        depth) all_depths ;; weights) all_weights ;; draw) draw ;;
        *) echo "claims/run.sh: $what is none of rates priors style size reflow depth weights draw" >&2; exit 2 ;;
    esac
done
