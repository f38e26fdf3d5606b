#!/usr/bin/env bash
# The long distillation of emoji64: the demo's settings for many times the rounds, then twice the less noisy times alone,
# which clean what is drawn; at last its sheet and report. Resumable: call it again after an interruption.
# usage: recipes/emoji64/distill.sh [OUT]
set -euo pipefail
out=${1:-runs/emoji64-long}
part() {  # folder, rounds, settings
  local folder=$1 rounds=$2 resume
  resume=$([ -e "$folder/recipe.json" ] && echo --resume || true)
  onestroke distill emoji64 --method swiftbrush --prompts src/onestroke/teachers/built_in/emoji64/prompts.txt \
    --out "$folder" --steps "$rounds" --set ema=0.995 $resume "${@:3}"
}
part "$out-first" 3600
part "$out-second" 800 --set init="$out-first" --set hi=0.3
part "$out" 600 --set init="$out-second" --set hi=0.3
python -c "import sys; from pathlib import Path; from onestroke.demo import report_on; report_on(Path(sys.argv[1]))" "$out"
