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

fit() { # OUT FLAGS: begun, gone on with, or done
    out=$1
    shift
    if [ ! -d "$out" ]; then
        ease-train fit demo --data kjv --out "$out" "$@"
    elif [ "$(done_steps "$out")" = True ]; then
        echo "reusing $out (remove it to train again)"
    else
        ease-train fit demo --data kjv --out "$out" --resume
    fi
}

export_to() { # CHECKPOINT BUNDLE: done where it must be
    if [ -f "$2/manifest.json" ] && [ ! "$1/config.json" -nt "$2/manifest.json" ]; then
        echo "reusing $2 (remove it to export again)"
    else
        ease-export build "$1" "$2" --target cpu  # where there is a GPU, too: the demo is of a CPU
        ease-export verify "$2" --checkpoint "$1"
    fi
}

say "1/5 train twelve layers with an exit after the sixth"
fit "$run/checkpoint"

say "2/5 train the control: six layers, the same steps"
fit "$run/plain6-checkpoint" --num-layers 6 --exits 6 --layer-weights 6 1

say "3/5 export the graphs, and compare them with the models"
export_to "$run/checkpoint" "$run/bundle"
export_to "$run/plain6-checkpoint" "$run/plain6"

say "4/5 generate: each token in the colour of the layer where it left, beside full depth"
ease-run generate "$run/bundle" --prompt "And it came to pass" --max-tokens 120 --threshold 0.2 --catch-up propagate \
    --temperature 0.8 --top-p 0.9 --seed 1 --show-exits --compare

say "5/5 measure perplexity and speed over thresholds, and beside the six layers (two minutes)"
if [ -f "$run/table.md" ] && [ ! "$run/bundle/manifest.json" -nt "$run/table.md" ]; then
    echo "reusing $run/table.json and $run/table.md (remove them to measure again)"
    cat "$run/table.md"
else
    ease-eval table "$run/bundle" --beside "$run/plain6" --data kjv --split test --thresholds 0,0.2,0.5 --catch-up propagate --catch-up verify \
        --scored-tokens 10000 --texts 4 --new-tokens 96 --rounds 3 --json "$run/table.json" --markdown "$run/table.md"
fi
cat <<END

Leaving saves time here; the row of six layers says what the depth was worth after these few minutes. A model that was trained for
longer comes with the package, and its table is in docs/experiments/code.md. Try it:

    ease-run generate ease:code --prompt "def read_json(path):" --show-exits
END
