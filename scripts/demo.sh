#!/bin/sh
# The main job on real text, end to end: train -> export -> verify -> generate -> table. Steps that are done are reused.
set -eu
run=runs/demo
mkdir -p "$run"

say() { printf '\n== %s\n' "$*"; }
cat <<END
A model with early exits on the King James Bible: train, export, verify, generate, measure. About ten minutes on two cores,
most of them training. All of it goes to $run; run it again to go on where it was stopped.
END

done_steps() { python -c "import json,sys; c=json.load(open(sys.argv[1])); print(c['step'] >= c['recipe']['train']['steps'])" "$1/config.json"; }

say "1/4 train"
if [ ! -d "$run/checkpoint" ]; then
    ease-train fit demo --data kjv --out "$run/checkpoint"
elif [ "$(done_steps "$run/checkpoint")" = True ]; then
    echo "reusing $run/checkpoint (remove it to train again)"
else
    ease-train fit demo --data kjv --out "$run/checkpoint" --resume
fi

say "2/4 export the graphs, and compare them with the model"
if [ -f "$run/bundle/manifest.json" ] && [ ! "$run/checkpoint/config.json" -nt "$run/bundle/manifest.json" ]; then
    echo "reusing $run/bundle (remove it to export again)"
else
    ease-export build "$run/checkpoint" "$run/bundle"
    ease-export verify "$run/bundle" --checkpoint "$run/checkpoint"
fi

say "3/4 generate: each token in the colour of the layer where it left, beside full depth"
ease-run generate "$run/bundle" --prompt "And it came to pass" --max-tokens 120 --threshold 0.5 --catch-up propagate \
    --temperature 0.8 --top-p 0.9 --seed 1 --show-exits --compare

say "4/4 measure perplexity and speed over thresholds (two or three minutes)"
if [ -f "$run/table.md" ] && [ ! "$run/bundle/manifest.json" -nt "$run/table.md" ]; then
    echo "reusing $run/table.json and $run/table.md (remove them to measure again)"
    cat "$run/table.md"
else
    ease-eval table "$run/bundle" --data kjv --split test --thresholds 0.3,0.5,0.7,0.9 --catch-up recompute --catch-up propagate \
        --scored-tokens 10000 --texts 4 --new-tokens 96 --rounds 3 --json "$run/table.json" --markdown "$run/table.md"
fi
