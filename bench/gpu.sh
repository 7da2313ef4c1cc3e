#!/bin/sh
# EASE on one NVIDIA GPU: the tests that need one, bits, greedy agreement with the CPU, and speed, with CUDA graphs and without.
# Meant for under eight minutes on an H100-class card, without a network once the extra `cuda` is installed. What is built already in OUT is not built again.
#
#   sh bench/gpu.sh [OUT] [CHECKPOINT]      # JSON and logs in OUT, runs/gpu by default
#
# CHECKPOINT is a trained model, for what random weights cannot say: greedy agreement of devices and precisions.
set -eu
out=${1:-runs/gpu}
trained=${2:-}
bin=${BIN:-.venv/bin}
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
    step "$1-$2${4:-}-speed" "$bin/python" bench/engine.py "$out/$1/bundle-$2" --device cuda --only "$3" --json "$out/$1-$2${4:-}.json"
}

devices_agree() { # PRECISION: a trained model in it on the GPU, beside torch and beside fp32 on the CPU
    bundle="$out/trained-$1"
    [ -d "$bundle" ] || step "trained-$1" "$bin/ease-export" build "$trained" "$bundle" --precision "$1" --target cuda
    step "verify-$1" "$bin/ease-export" verify "$bundle" --checkpoint "$trained" --device cuda
    step "greedy-$1" "$bin/python" bench/greedy.py "$bundle" --device cuda --json "$out/greedy-$1.json"
    step "agreement-$1" "$bin/python" bench/greedy.py --compare "$out/greedy-cpu.json" "$out/greedy-$1.json"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/card.csv"
"$bin/pip" freeze | grep -iE "^(onnxruntime|nvidia|torch|numpy|transformers)" > "$out/versions.txt"

# What is not timed, side by side.
step tests "$bin/pytest" -q -m cuda tests/runtime/test_device.py tests/runtime/test_captures.py &
build 135m fp16 int8 int4 &
build 1b fp16 int4 &
if [ -n "$trained" ]; then
    [ -d "$out/trained-cpu" ] || step trained-cpu "$bin/ease-export" build "$trained" "$out/trained-cpu" --precision fp32 --target cpu
    step greedy-cpu "$bin/python" bench/greedy.py "$out/trained-cpu" --device cpu --json "$out/greedy-cpu.json"
    for precision in fp32 fp16 int8 int4; do devices_agree "$precision" & done
fi
wait

# What is timed, one by one.
for shape in 135m 1b; do
    speed "$shape" fp16 depth,verify,scaling
    export EASE_CUDA_GRAPHS=0
    speed "$shape" fp16 depth -uncaptured
    unset EASE_CUDA_GRAPHS
    speed "$shape" int4 depth,verify,scaling
    step "$shape-transformers" "$bin/python" bench/transformers_shape.py --shape "$shape" --json "$out/$shape-transformers.json"
done

speed 135m int8 depth

[ -n "${KEEP:-}" ] || rm -rf "$out"/135m "$out"/1b "$out"/trained-*/  # gigabytes that anybody can make again
echo "left in $out: $(ls "$out" | tr '\n' ' ')"
if ls "$out"/*.failed > /dev/null 2>&1; then
    echo "failed:$(cd "$out" && ls ./*.failed | tr '\n' ' ')"
    exit 1
fi
