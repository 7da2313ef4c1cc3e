#!/bin/sh
# EASE on one NVIDIA GPU: the tests that need one, bits, greedy agreement with the CPU, and speed, with CUDA graphs and without.
# Meant for under eight minutes on an H100-class card, without a network once the extra `cuda` is installed. What is built already in OUT is not built again.
#
#   sh bench/gpu.sh [OUT] [CHECKPOINT]      # JSON and logs in OUT, runs/gpu by default
#
# CHECKPOINT is a trained model: greedy agreement of its precisions with fp32 on the CPU; without one it is that of the shipped model's bundle alone,
# and `ease-export verify` has random weights. onnxruntime-genai stands beside where it is there (pip install onnxruntime-genai-cuda transformers onnx_ir,
# in BIN's environment or in that of PEERS, a python).
#
#   DEVICE=cpu SHAPES=tiny sh bench/gpu.sh /tmp/try     # every step, in minutes, where there is no GPU: what it says is not of a GPU
set -eu
out=${1:-runs/gpu}
trained=${2:-}
bin=${BIN:-.venv/bin}
peers=${PEERS:-$bin/python}
device=${DEVICE:-cuda}
shapes=${SHAPES:-135m 1b}
mkdir -p "$out"
rm -f "$out"/*.failed
step() { # NAME COMMAND...: its output in a log, and a file NAME.failed where it fails
    name=$1
    shift
    echo "== $name ($(date +%T))"
    timeout "${LIMIT:-180}" "$@" > "$out/$name.log" 2>&1 || { echo "   failed: $out/$name.log"; touch "$out/$name.failed"; }
}

build() { # SHAPE PRECISION...: checkpoint and bundles of random weights; int8 and int4 have fp16 around
    shape=$1
    shift
    for precision in "$@"; do
        step "$shape-$precision-build" "$bin/python" bench/llama_shape.py "$out/$shape" --shape "$shape" --precision "$precision" --target cuda
    done
}

speed() { # SHAPE PRECISION SECTIONS [NAME]: the engine with scripted exits, its passes captured as CUDA graphs unless told otherwise
    step "$1-$2${4:-}-speed" "$bin/python" bench/engine.py "$out/$1/bundle-$2" --device "$device" --only "$3" --json "$out/$1-$2${4:-}.json"
}

greedy() { # NAME BUNDLE DEVICE: what a bundle says there
    step "greedy-$1" "$bin/python" bench/greedy.py "$2" --device "$3" --json "$out/greedy-$1.json"
}

agreement() { # NAME OF: how far two of them say the same
    step "agreement-$2" "$bin/python" bench/greedy.py --compare "$out/greedy-$1.json" "$out/greedy-$2.json"
}

devices_agree() { # PRECISION: a trained model in it on the GPU, beside torch and beside fp32 on the CPU
    bundle="$out/trained-$1"
    [ -d "$bundle" ] || step "trained-$1" "$bin/ease-export" build "$trained" "$bundle" --precision "$1" --target cuda
    step "verify-$1" "$bin/ease-export" verify "$bundle" --checkpoint "$trained" --tokens 64 --device "$device"
    greedy "$1" "$bundle" "$device"
    agreement cpu "$1"
}

verify_random() { # PRECISION: a bundle of random weights beside torch
    step "verify-$1" "$bin/ease-export" verify "$out/$small/bundle-$1" --checkpoint "$out/$small/checkpoint" --tokens 16 --device "$device"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/card.csv" || [ "$device" = cpu ]
"$bin/pip" freeze | grep -iE "^(onnxruntime|nvidia|torch|numpy|transformers)" > "$out/versions.txt"

# What is not timed, side by side.
export OMP_NUM_THREADS=4  # torch's, of each
small=${shapes%% *}
bf16=bf16
[ "$device" != cpu ] || bf16=  # which no CPU runs
step tests "$bin/pytest" -q -m cuda tests/runtime/test_device.py tests/runtime/test_captures.py &
for shape in $shapes; do
    # shellcheck disable=SC2086
    if [ "$shape" = "$small" ]; then build "$shape" fp16 $bf16 int8 int4 & else build "$shape" fp16 int4 & fi
done
greedy shipped-cpu ease_runtime/shipped/code cpu &
greedy shipped ease_runtime/shipped/code "$device" &
if [ -n "$trained" ]; then
    [ -d "$out/trained-cpu" ] || step trained-cpu "$bin/ease-export" build "$trained" "$out/trained-cpu" --precision fp32 --target cpu
    greedy cpu "$out/trained-cpu" cpu
    for precision in fp32 fp16 $bf16 int8 int4; do devices_agree "$precision" & done
fi
wait
agreement shipped-cpu shipped
[ -n "$trained" ] || { for precision in fp16 $bf16 int4; do verify_random "$precision" & done; wait; }
unset OMP_NUM_THREADS

# What is timed, one by one.
for shape in $shapes; do
    speed "$shape" fp16 depth,verify,scaling
    export EASE_CUDA_GRAPHS=0
    speed "$shape" fp16 depth -uncaptured
    unset EASE_CUDA_GRAPHS
    speed "$shape" int4 depth,verify,scaling
    step "$shape-transformers" "$bin/python" bench/transformers_shape.py --shape "$shape" --device "$device" --json "$out/$shape-transformers.json"
    if "$peers" -c "import onnxruntime_genai" 2> /dev/null; then
        step "$shape-genai" "$bin/python" bench/peers.py "$out/$shape/checkpoint" "$out/$shape/bundle-fp16" --device "$device" --runtimes genai \
            --python "$peers" --prompt-tokens 32 --batch 1,8,32 --work "$out/$shape/peers" --json "$out/$shape-genai.json"
    else
        echo "== $shape-genai left out: $peers has no onnxruntime_genai"
    fi
done

for precision in int8 $bf16; do speed "$small" "$precision" depth; done

# shellcheck disable=SC2086
[ -n "${KEEP:-}" ] || (cd "$out" && rm -rf $shapes trained-*/)  # gigabytes that anybody can make again
echo "left in $out: $(ls "$out" | tr '\n' ' ')"
if ls "$out"/*.failed > /dev/null 2>&1; then
    echo "failed:$(cd "$out" && ls ./*.failed | tr '\n' ' ')"
    exit 1
fi
