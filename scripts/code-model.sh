#!/bin/sh
# The models and the table of docs/experiments/code.md, in runs/code: about four hours of one core, training nearly all of it. What is
# there is not made again.
set -eu
mkdir -p runs/code
cd runs/code
text="--data python-stdlib --threads 1"
shape="--dim 256 --num-heads 4 --num-kv-heads 2 --max-positions 512 --bpe-vocab-size 4096"
steps="--batch-size 2 --sequence-length 512 --steps 4000 --warmup-steps 150 --learning-rate 0.003 --eval-every 400 --save-every 200"
tuning="--recipe ee-tuning --exit-adapter mlp --adapter-dim 256 --batch-size 2 --warmup-steps 30 --learning-rate 2e-3"

fit() { # OUT RECIPE FLAGS: begun, gone on with, or done
    out=$1
    [ -e "$out.done" ] && return
    # shellcheck disable=SC2086
    if [ -d "$out" ]; then ease-train fit --resume --out "$out" $text; else shift && ease-train fit "$@" $text $shape $steps --out "$out"; fi
    touch "$out.done"
}

fit exits small --num-layers 12 --exits 4,8,12 --layer-weights 4 0.3 --layer-weights 8 0.3 --layer-weights 12 1
fit plain6 standard --num-layers 6 --exits 6 --layer-weights 6 1
# shellcheck disable=SC2086
{
    [ -d tuned8 ] || ease-train tune exits --exits 8,12 --layer-weights 8 1 --steps 1200 $tuning $text --out tuned8
    [ -d tuned ] || ease-train tune tuned8 --exits 4,6,8,12 --layer-weights 4 1 --layer-weights 6 1 --layer-weights 8 0.3 --steps 1000 $tuning $text --out tuned
    [ -d gated ] || ease-train gates tuned --gate-width 64 --batch-size 8 --steps 120 --eval-tokens 24000 $text --out gated
}
[ -d bundle ] || ease-export build gated bundle --precision int8 --target cpu
[ -d plain ] || ease-export build plain6 plain --precision int8 --target cpu
ease-eval table bundle --beside plain --data python-stdlib --split test --policy gate --exit-thresholds off,off,0 --exit-thresholds off,0.9,0 \
    --exit-thresholds off,0.8,0 --exit-thresholds 0.8,0.8,0 --exit-thresholds 0.6,0.6,0 --exit-thresholds off,0,0 --catch-up propagate --catch-up recompute \
    --scored-tokens 15000 --texts 6 --new-tokens 128 --rounds 5 --json code.json
