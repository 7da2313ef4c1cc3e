#!/bin/sh
# EASE on one NVIDIA GPU: the tests that need one, bits, greedy agreement with the CPU, and speed. Meant for under eight minutes
# on an H100-class card, without a network once the extra `cuda` is installed. Written without a GPU, and not run on one.
#
#   sh bench/gpu.sh [OUT]      # JSON and logs in OUT, runs/gpu by default
set -eu
out=${1:-runs/gpu}
bin=${BIN:-.venv/bin}
mkdir -p "$out"
step() { name=$1; shift; echo "== $name"; "$@" > "$out/$name.log" 2>&1 || { echo "   failed: $out/$name.log"; failed="$failed $name"; }; }
failed=""

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/card.csv"
"$bin/pip" freeze | grep -iE "^(onnxruntime|nvidia|torch|numpy)" > "$out/versions.txt"
step tests "$bin/pytest" -q -m cuda tests

for shape in 135m 1b; do
    for precision in fp16 int4; do
        step "$shape-$precision-build" "$bin/python" bench/llama_shape.py "$out/$shape" --shape "$shape" --precision "$precision" --target cuda
        bundle="$out/$shape/bundle-$precision"
        step "$shape-$precision-verify" "$bin/ease-export" verify "$bundle" --checkpoint "$out/$shape/checkpoint" --device cuda
        step "$shape-$precision-speed" "$bin/python" bench/engine.py "$bundle" --device cuda --only depth,verify,scaling --json "$out/$shape-$precision.json"
    done
done

# Greedy answers of the small shape on both devices, by the same weights.
for device in cpu cuda; do
    step "greedy-$device" "$bin/python" bench/greedy.py "$out/135m/bundle-fp16" --device "$device" --json "$out/greedy-$device.json"
done
step agreement "$bin/python" bench/greedy.py --compare "$out/greedy-cpu.json" "$out/greedy-cuda.json"

rm -rf "$out"/135m "$out"/1b  # gigabytes that anybody can make again
echo "left in $out: $(ls "$out" | tr '\n' ' ')"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
