#!/usr/bin/env bash
# Train the embedded demo checkpoint from nothing: VQVAE, VAR, classifier, evaluation.
#
#   tools/train_demo.sh OUT [VQVAE_MINUTES] [VAR_MINUTES]
#
# With two or more GPUs the classifier is trained, and the VAR compiled and timed, beside the VQVAE; the VAR then
# trains on all of them. A step whose checkpoint is finished in OUT is not repeated.
set -euo pipefail
out=$1 vqvae_minutes=${2:-2} var_minutes=${3:-4}
cd "$(dirname "$0")"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
other=$((gpus > 1 ? 1 : 0))

beside() { # what only needs the other GPU
    [ -f "$out/classifier.json" ] ||
        CUDA_VISIBLE_DEVICES=$other python3 train_classifier.py --minutes 0.4 --out "$out" >"$out/classifier.log" 2>&1
    [ -f "$out/attention" ] && return
    for attention in scales flex; do
        CUDA_VISIBLE_DEVICES=$other python3 train_var.py --rehearse --steps 30 --attention $attention --out "$out" \
            >"$out/rehearsal-$attention.log" 2>&1 || echo "pictures/s 0" >>"$out/rehearsal-$attention.log"
    done
    rate() { grep -o 'pictures/s [0-9]*' "$out/rehearsal-$1.log" | tail -1 | cut -d' ' -f2; }
    [ "$(rate flex)" -gt "$(rate scales)" ] && echo flex >"$out/attention" || echo scales >"$out/attention"
}

vqvae() { "$@" train_vqvae.py --minutes "$vqvae_minutes" --out "$out" 2>&1 | tee "$out/vqvae.log"; }
if [ ! -f "$out/vqvae.json" ] && [ "$gpus" -gt 1 ] && [ ! -f "$out/attention" ]; then
    beside &
    CUDA_VISIBLE_DEVICES=0 vqvae python3
    wait
elif [ ! -f "$out/vqvae.json" ]; then
    vqvae torchrun --standalone --nproc-per-node "$gpus"
fi
beside
tail -n 3 "$out"/classifier.log "$out"/rehearsal-*.log
if [ ! -f "$out/var.json" ]; then
    torchrun --standalone --nproc-per-node "$gpus" train_var.py --vae "$out/vqvae.ckpt" --minutes "$var_minutes" \
        --attention "$(cat "$out/attention")" --out "$out" 2>&1 | tee "$out/var.log"
fi
python3 evaluate_demo.py --var "$out/var.safetensors" --vae "$out/vae.safetensors" --classifier "$out/classifier.safetensors" \
    --per-class 24 --guidance 1 2 3 --top-p 0.9 0.96 --drop 1 2 --out "$out" 2>&1 | tee "$out/evaluation.log"
