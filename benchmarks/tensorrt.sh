#!/usr/bin/env bash
# Everything of TensorRT that needs a GPU, and a table last. Steps do not depend on each other's success.
#
#   benchmarks/tensorrt.sh OUT [plugins] [demo] [infinity]      default: all three
#
# Written for TensorRT 10.15 to 11 and for 8.6, whose binding needs a Python of its own:
#   TENSORRT_PYTHON   runs Python with the binding (python3)          TOPROVAR_PLUGIN_LIBRARY   the plugin library
#   TORCH_PYTHON      runs Python with PyTorch (python3)              TOPROVAR_TRTEXEC          trtexec, where there is one
#   TOPROVAR_RUN      the C++ runtime (build/src/toprovar/runtime/cpp/toprovar_run), with LD_LIBRARY_PATH if need be
#   WORK              bundles, engines and cases; kept and used again (OUT/work)
#   BUILD_OPTIONS     of `python -m toprovar.exporter.engine_tensorrt`, such as --optimization-level 1 ()
#   INFINITY_OPTIONS  besides, for Infinity alone, such as --shared-tokens 1024 ()
#   STAGES            of Infinity's step, built side by side (4)
#   MPS               1: builds share the GPU through CUDA's Multi-Process Service, started and ended here (0)
#   DEPTHS            of Infinity-2B's 32 layers, what is built (32)
#   SCALES            of Infinity that trtexec runs, too (0 6 12)
set -u
out=${1:?a folder for results} && shift
parts=" ${*:-plugins demo infinity} "
work=${WORK:-$out/work} run=${TOPROVAR_RUN:-build/src/toprovar/runtime/cpp/toprovar_run}
trt=${TENSORRT_PYTHON:-python3} torch=${TORCH_PYTHON:-python3}
mkdir -p "$out" "$work"
export CUDA_MODULE_LOADING=LAZY TOPROVAR_CACHE=$work/cache

# step NAME COMMAND...: its output goes to OUT/NAME.log, its end is shown, its status is kept.
step() {
    local name=$1 code=0
    shift
    echo "=== [$SECONDS s] $name"
    timeout "${LIMIT:-200}" "$@" >"$out/$name.log" 2>&1 || code=$?
    echo "rc=$code $name" | tee -a "$out/steps.txt"
    tail -n "${TAIL:-4}" "$out/$name.log" | cut -c1-400
}

# engines NAME OPTIONS...: of WORK/NAME.bundle
engines() {
    local name=$1
    shift
    LIMIT=${BUILD_LIMIT:-1500} step "engines_$name" $trt -m toprovar.exporter.engine_tensorrt "$work/$name.bundle" \
        --timing-cache "$work/timing.cache" ${BUILD_OPTIONS:-} "$@"
}

# measured NAME: golden trace and latency of WORK/NAME.bundle
measured() {
    step "verify_cpp_$1" $run "$work/$1.bundle" --verify --no-hashes
    step "verify_py_$1" $trt -m toprovar verify "$work/$1.bundle" --target tensorrt
    step "bench_cpp_$1" bash -c "$run '$work/$1.bundle' --bench --repeat 20 --no-hashes >'$out/bench_cpp_$1.json'"
}

$torch - "$out/machine.json" <<'PYTHON'
import json, platform, subprocess, sys
asked = "name,driver_version"
gpu = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "-i", "0"], capture_output=True, text=True)
name, driver = (gpu.stdout.strip() or ",").split(",")[:2]
found = {"gpu": name.strip(), "driver": driver.strip(), "python": platform.python_version()}
json.dump(found, open(sys.argv[1], "w"))
PYTHON

if [[ $parts == *" plugins "* ]]; then
    [ -f "$work/cases/cases.json" ] || step cases $torch benchmarks/tensorrt_ops.py cases "$work/cases"
    TAIL=60 LIMIT=400 step ops $trt benchmarks/tensorrt_ops.py run "$work/cases" --out "$out/ops.json"
    sanitizer="compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1"
    step sanitizer $sanitizer $trt benchmarks/tensorrt_ops.py run "$work/cases" --out "$work/few.json" --few
fi

# Bundles are made and engines are built beside each other, and measured one by one. Without MPS the GPU turns from one
# process to the next every few milliseconds, and each of thousands of short timings waits for its turn.
[ "${MPS:-0}" = 1 ] && nvidia-cuda-mps-control -d
demo=() infinity=()
[[ $parts == *" demo "* ]] && demo=(dense fast)
if [[ $parts == *" infinity "* ]]; then
    for depth in ${DEPTHS:-32}; do infinity+=("dense_$depth" "fast_$depth"); done
fi
for profile in "${demo[@]}"; do
    {
        bundle=$work/demo_$profile.bundle
        [ -d "$bundle" ] || step "export_$profile" $torch -m toprovar export --profile "$profile" --precision fp16 --per-class 2 --seeds 1 -o "$bundle"
        engines "demo_$profile" --jobs 2
    } &
done
for one in "${infinity[@]}"; do
    {
        bundle=$work/infinity_$one.bundle
        [ -d "$bundle" ] || LIMIT=400 step "make_infinity_$one" $torch benchmarks/tensorrt_bundle.py infinity "$bundle" --plan "${one%_*}" --depth "${one#*_}"
        engines "infinity_$one" ${INFINITY_OPTIONS:-} --stages "${STAGES:-4}" --jobs $((${STAGES:-4} + 3))
    } &
done
wait
[ "${MPS:-0}" = 1 ] && echo quit | nvidia-cuda-mps-control

for profile in "${demo[@]}"; do
    bundle=$work/demo_$profile.bundle
    measured "demo_$profile"
    program=()
    [ -n "${TOPROVAR_TRTEXEC:-}" ] && program=(--trtexec)
    TAIL=40 step "bench_py_demo_$profile" $trt -m toprovar bench "$bundle" --target tensorrt "${program[@]}" -o "$out/bench_py_demo_$profile.json"
    step "pictures_trt_$profile" $trt benchmarks/tensorrt_bundle.py pictures "$bundle" "$work/trt_$profile.npz" --count 4
    step "pictures_ort_$profile" $torch benchmarks/tensorrt_bundle.py pictures "$bundle" "$work/ort_$profile.npz" --target onnxruntime --count 4 --follow "$work/trt_$profile.npz"
    label=$($torch -c "import sys, numpy; print(numpy.load(sys.argv[1])['labels'][0])" "$work/trt_$profile.npz")
    step "picture_cpp_$profile" $run "$bundle" --label "$label" --seed 0 -o "$work/cpp_$profile.png"
    step "compare_$profile" $torch benchmarks/tensorrt_bundle.py compare "$work/trt_$profile.npz" "$work/ort_$profile.npz" "$work/cpp_$profile.png"
done

if [ ${#infinity[@]} -gt 0 ]; then
    TAIL=12 step torch $torch benchmarks/infinity.py --quick --models 2b --batches 1 --out "$out/torch"
    for one in "${infinity[@]}"; do measured "infinity_$one"; done
    if [ -n "${TOPROVAR_TRTEXEC:-}" ]; then
        for one in "${infinity[@]}"; do
            TAIL=20 LIMIT=600 step "bench_py_infinity_$one" $trt benchmarks/tensorrt_bundle.py trtexec "$work/infinity_$one.bundle" \
                "$out/bench_py_infinity_$one.json" --scales ${SCALES:-0 6 12}
        done
    fi
fi

$torch benchmarks/tensorrt_table.py "$out" --out "$out/tensorrt.json"
