#!/usr/bin/env bash
# Train the embedded class-conditional checkpoint from nothing: VQVAE, VAR, judges, evaluation.
#
#   tools/train_demo.sh OUT [VQVAE_MINUTES] [VAR_MINUTES]
#
# The judges are trained, and the VAR is compiled, beside the VQVAE: on the second GPU where there is one. The VAR then
# trains on all GPUs. What is finished in OUT is not repeated; an unfinished VQVAE or VAR goes on from its checkpoint, and
# a finished one (delete its .json) goes on where more minutes are given than it had.
set -euo pipefail
out=$(realpath -m "$1") vqvae_minutes=${2:-3.4} var_minutes=${3:-13.6}
cd "$(dirname "$0")"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
visible=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}
first=${visible%%,*} other=${visible##*,}

beside() { # what needs no VQVAE: the judges, and the VAR's kernels in the compiler's cache
    export CUDA_VISIBLE_DEVICES=$other
    [ -f "$out/rehearsal.log" ] || python3 train_var.py --rehearse --steps 20 --out "$out" >"$out/rehearsal.log" 2>&1 ||
        echo "no graph" >"$out/plain"
    for judge in classifier perceptual; do
        [ -f "$out/$judge.json" ] ||
            python3 train_$judge.py --out "$out" >"$out/$judge.log" 2>&1 || echo "$judge failed"
    done
}

beside &
[ -f "$out/vqvae.json" ] ||
    CUDA_VISIBLE_DEVICES=$first python3 train_vqvae.py --minutes "$vqvae_minutes" --out "$out" 2>&1 | tee -a "$out/vqvae.log"
wait
if [ ! -f "$out/var.json" ]; then
    graph=$([ -f "$out/plain" ] && echo --no-graph || echo --graph)
    python3 -m torch.distributed.run --standalone --nproc-per-node "$gpus" train_var.py --vae "$out/vqvae.ckpt" --minutes "$var_minutes" \
        "$graph" --out "$out" 2>&1 | tee -a "$out/var.log"
fi
CUDA_VISIBLE_DEVICES=$first python3 evaluate_demo.py --var "$out/var.safetensors" --vae "$out/vae.safetensors" \
    --classifier "$out/classifier.safetensors" --per-class 16 --guidance 1.5 3 --top-p 0.5 0.7 0.9 --out "$out" \
    2>&1 | tee "$out/evaluation.log"
