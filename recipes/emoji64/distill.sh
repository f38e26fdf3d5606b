#!/usr/bin/env bash
# The long distillation of emoji64: the demo's settings with a larger batch and many times the rounds.
# Resumable: call it again after an interruption.  usage: recipes/emoji64/distill.sh [OUT]
set -euo pipefail
out=${1:-runs/emoji64-long}
resume=$([ -e "$out/recipe.json" ] && echo --resume || true)
onestroke distill emoji64 --method swiftbrush --prompts src/onestroke/teachers/built_in/emoji64/prompts.txt \
  --out "$out" --steps 4500 --batch-size 48 --set ema=0.995 $resume
