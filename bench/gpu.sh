#!/usr/bin/env bash
# The GPU figures, one JSON file for each command: bash bench/gpu.sh DIR [NAME OF THE GPU]
# Clocks are left as they are. A command checks its kernels first; one that fails leaves no file, and the rest go on.
# To try it out: AT_ONCE=1 LONG=4096 MIDDLE=2048 SHORT=1024 LAYERS=4 bash bench/gpu.sh DIR (no figures to keep).
set -uo pipefail
out=${1:?usage: bash bench/gpu.sh DIR [NAME]}
gpu=${2:-h200}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
long=${LONG:-131072} middle=${MIDDLE:-32768} short=${SHORT:-8192}
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$(dirname "$here")"
mkdir -p "$out"

bench() { # FILE SECONDS ARGUMENTS...
  local file="$out/$1-$gpu.json" limit=$2 started=$SECONDS
  shift 2
  if timeout "$limit" "$python" -m saccade bench "$@" --device cuda --json > "$file.new" 2> "$file.log"; then
    mv "$file.new" "$file"
    echo "$((SECONDS - started)) s: saccade bench $*"
  else
    echo "FAILED ($?) after $((SECONDS - started)) s: saccade bench $*"
    rm -f "$file.new"
  fi
  tail -n 40 "$file.log" >&2
  rm -f "$file.log"
}

step() {
  if [ -n "${AT_ONCE:-}" ]; then bench "$@" & else bench "$@"; fi
}

step attend-density 60 attend --length "$middle" --density 0.03,0.1,0.25,0.5
step attend-long 80 attend --length "$long" --density 0.1 --slash
step e2e 120 e2e --length "$long" --density 0.1 --layers "${LAYERS:-32}"
step e2e-decode 120 e2e --length "$long" --layers "${LAYERS:-32}" --methods dense,duo,tidal,quest,hip,recycled
step decode 45 decode --length "$long" --density 0.0625
step select 45 select --length "$long" --density 0.1
if [ -z "${AT_ONCE:-}" ] && "$python" -c "import fla" 2> /dev/null; then timeout 75 "$python" "$here/warm_fla.py" >&2; fi
step scan 100 scan --length "$long" --decay head
step attend-backward 60 attend --length "$((middle / 2)),$middle" --density 0.1 --backward
step attend-short 40 attend --length "$short" --density 0.1
wait
