#!/usr/bin/env bash
# Train the embedded demo checkpoint from nothing: VQVAE, VAR, classifier, evaluation.
#
#   tools/train_demo.sh OUT [VQVAE_MINUTES] [VAR_MINUTES]
#
# With two or more GPUs the classifier is trained, and the VAR compiled, beside the VQVAE; the VAR then trains on all
# of them. A step whose checkpoint is finished in OUT is not repeated.
set -euo pipefail
out=$1 vqvae_minutes=${2:-1.3} var_minutes=${3:-4}
cd "$(dirname "$0")"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
other=$((gpus > 1 ? 1 : 0))

beside() { # what only needs another GPU: the classifier, and the VAR's kernels in the compiler's cache
    [ -f "$out/rehearsal.log" ] ||
        CUDA_VISIBLE_DEVICES=$other python3 train_var.py --rehearse --steps 20 --out "$out" >"$out/rehearsal.log" 2>&1 ||
        echo "no graph" >"$out/plain"
    [ -f "$out/classifier.json" ] ||
        CUDA_VISIBLE_DEVICES=$other python3 train_classifier.py --minutes 0.3 --out "$out" >"$out/classifier.log" 2>&1
}

beside &
if [ ! -f "$out/vqvae.json" ]; then
    CUDA_VISIBLE_DEVICES=0 python3 train_vqvae.py --minutes "$vqvae_minutes" --out "$out" 2>&1 | tee "$out/vqvae.log"
fi
wait
tail -n 2 "$out/classifier.log" "$out/rehearsal.log"
if [ ! -f "$out/var.json" ]; then
    graph=$([ -f "$out/plain" ] && echo --no-graph || echo --graph)
    torchrun --standalone --nproc-per-node "$gpus" train_var.py --vae "$out/vqvae.ckpt" --minutes "$var_minutes" \
        "$graph" --out "$out" 2>&1 | tee "$out/var.log"
fi
python3 evaluate_demo.py --var "$out/var.safetensors" --vae "$out/vae.safetensors" --classifier "$out/classifier.safetensors" \
    --per-class 16 --guidance 1 2 3 --out "$out" 2>&1 | tee "$out/evaluation.log"
