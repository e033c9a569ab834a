#!/usr/bin/env bash
# Install Weights & Biases beside the project, and store your API key for it, once on a machine.
#
#   scripts/setup_wandb.sh [--dry_run] [--host URL]
#
# Asks for the key, which https://wandb.ai/authorize shows; nothing of what is typed is printed.
# Where WANDB_API_KEY is set, that key is taken and nothing is asked.
#
#   --dry_run    print the commands, run none of them
#   --host URL   a server of your own
#   PYTHON=...   another Python than .venv/bin/python
#
# Exit status: 0 the key is stored and works, 1 a command failed, 2 wrong use.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() {
  echo "setup_wandb: error: $1" >&2
  exit "${2:-1}"
}

# Print a command, and run it unless this is a dry run.
run() {
  printf '+ %s\n' "$*"
  if [ "$dry_run" = no ]; then
    "$@" || fail "$2 $3 failed with status $?"
  fi
}

dry_run=no
host=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run | --dry-run) dry_run=yes ;;
    --host)
      [ $# -gt 1 ] && [[ $2 = http*://?* ]] || fail "--host needs a URL like https://wandb.example.com" 2
      host=(--host "$2")
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail "unknown argument $1; see --help" 2 ;;
  esac
  shift
done

python=${PYTHON:-.venv/bin/python}
if [ "$dry_run" = no ] && ! command -v "$python" >/dev/null; then
  fail "there is no $python; \`make setup\` makes it" 2
fi
if ! "$python" -c 'import wandb' 2>/dev/null; then
  run "$python" -m pip install --quiet --constraint constraints.txt wandb
fi
if [ -n "${WANDB_API_KEY:-}" ]; then
  run "$python" -m wandb login --verify "${host[@]}" # finds the key in its environment
elif [ -t 0 ] || [ "$dry_run" = yes ]; then
  run "$python" -m wandb login --relogin --verify "${host[@]}"
else
  fail "there is no terminal to ask for the key on; set WANDB_API_KEY" 2
fi
cat <<'EOF'

  python train.py --config recipes/single_gpu_full.yaml            logs to W&B
  python train.py --config ... --wandb_project NAME --wandb_name RUN
  python train.py --config ... --no_wandb                          does not
  WANDB_MODE=offline python train.py ...                           logs to disk; `wandb sync` sends it
EOF
