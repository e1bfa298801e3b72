#!/usr/bin/env bash
# Train the embedded text demo from nothing: judge, BSQ-VAE, Infinity with its word encoder, evaluation.
#
#   tools/train_text_demo.sh OUT [VAE_MINUTES] [INFINITY_MINUTES] [DECODER_MINUTES]
#
# One GPU. The judge is trained, and the transformer compiled, beside the VAE; the decoder goes on by itself beside the
# transformer. A step whose facts lie in OUT is not repeated; an interrupted one goes on.
set -euo pipefail
out=$1 vae_minutes=${2:-3.2} infinity_minutes=${3:-12} decoder_minutes=${4:-1.8}
cd "$(dirname "$0")"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8

beside() { # what leaves most of the GPU to the VAE
    [ -f "$out/judge.json" ] || python3 train_judge.py --minutes 1.6 --out "$out" >"$out/judge.log" 2>&1
    for mode in "" --no-graph --no-compile "--no-compile --no-graph"; do # the first that works here
        echo "$mode" >"$out/mode"
        # shellcheck disable=SC2086
        python3 train_infinity.py --rehearse --steps 20 $mode --out "$out" >"$out/rehearsal.log" 2>&1 && break
        cat "$out/rehearsal.log" >>"$out/rehearsal.failed"
    done
}

[ -f "$out/infinity.json" ] || beside &
[ -f "$out/bsq_vae.json" ] ||
    python3 train_bsq_vae.py --minutes "$vae_minutes" --out "$out" 2>&1 | tee "$out/bsq_vae.log"
wait
if [ ! -f "$out/infinity.json" ]; then
    cp "$out/bsq_vae.ckpt" "$out/tokenizer.ckpt" # what the labels are made with: the encoder stays, the decoder improves
    python3 train_bsq_vae.py --decoder-only --minutes "$(python3 -c "print($vae_minutes + $decoder_minutes)")" --out "$out" \
        >"$out/decoder.log" 2>&1 &
    # shellcheck disable=SC2046
    python3 train_infinity.py --vae "$out/tokenizer.ckpt" --minutes "$infinity_minutes" $(cat "$out/mode") \
        --out "$out" 2>&1 | tee "$out/infinity.log"
    wait
fi
python3 evaluate_text_demo.py --demo "$out" --judge "$out/judge.safetensors" --prompts 384 --guidance 1.5 2 3 \
    --out "$out" 2>&1 | tee "$out/text_evaluation.log"
