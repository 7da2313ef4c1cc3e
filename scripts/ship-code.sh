#!/bin/sh
# The bundle that comes with the package, ease:code, made again, and the plain models beside it in docs/experiments/code.md; in runs/code. They were
# trained side by side on one H200, in four minutes, where the first was stopped at its checkpoint of step 1,800 (here: Ctrl-C after that).
# What another machine trains differs.
set -eu
mkdir -p runs/code
cd runs/code
text="--data python-stdlib+test"
shape="--dim 256 --num-heads 4 --num-kv-heads 2 --max-positions 512 --bpe-vocab-size 4096 --batch-size 32 --sequence-length 512"
steps="--steps 2250 --warmup-steps 180 --learning-rate 0.0025 --eval-every 450 --save-every 450 --eval-tokens 50000 --precision bf16"

# shellcheck disable=SC2086
{
    [ -d e468 ] || ease-train fit small --num-layers 12 --exits 4,6,8,12 --layer-weights 4 0.2 --layer-weights 6 0.2 --layer-weights 8 0.2 --layer-weights 12 1 \
        $text $shape $steps --out e468
    for layers in 6 8 12; do
        [ -d "plain$layers" ] || ease-train fit standard --num-layers "$layers" --exits "$layers" --layer-weights "$layers" 1 $text $shape $steps --out "plain$layers"
        [ -d "plain-$layers" ] || ease-export build "plain$layers" "plain-$layers" --precision int8 --target cpu
    done
}
[ -d code ] || ease-export build e468 code --precision int8 --exits 6,12 --target cpu
[ -f code-shipped.json ] || ease-eval table code --beside plain-6 --beside plain-8 --beside plain-12 --data python-stdlib --split test \
    --thresholds 0,0.5,0.7,0.9 --catch-up propagate,recompute,verify --scored-tokens 10000 --texts 5 --new-tokens 96 --rounds 5 --json code-shipped.json
ease-eval calibrate code --data python-stdlib+test --split validation --tokens 448 --delta 0.1
