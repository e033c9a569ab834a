#!/usr/bin/env bash
# Install the peers that scripts/bench_loader.py compares with, each into a venv of its own under
# .bench/, on top of .venv (so PyTorch is not installed five times). What fails to install is
# reported, and bench_loader.py then reports it as missing.
#
#   scripts/bench_setup.sh [PEER ...]         default: all; FFCV and SPDL need root for Debian packages
set -uo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
cd "$(dirname "$0")/.."
[ -e .venv/ready ] || scripts/env_setup.sh || exit

base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

install() { # PEER PIP-ARGUMENTS...
  local venv=.bench/$1
  shift
  [ -x "$venv/bin/python" ] || .venv/bin/python -m venv "$venv" || return
  echo "$base" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

for peer in "${@:-mosaic litdata dali ffcv spdl pillow}"; do
  for name in $peer; do
    case $name in
      mosaic) install mosaic mosaicml-streaming ;;
      litdata) install litdata litdata ;;
      dali) install dali nvidia-dali-cuda130 ;;
      spdl) # loads the libraries of FFmpeg 4 to 9
        apt-get install -qq --no-install-recommends ffmpeg >/dev/null && install spdl spdl ;;
      pillow) install pillow --force-reinstall --no-deps "$(grep '^pillow==' constraints.txt)" ;; # plain, beside Pillow-SIMD
      ffcv)
        { apt-get install -qq --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config g++ >/dev/null &&
          install ffcv numba opencv-python-headless pytorch_pfn_extras fastargs terminaltables assertpy setuptools wheel &&
          install ffcv --no-build-isolation --no-deps ffcv; } ;;
      *) echo "bench_setup: unknown peer $name" >&2 && exit 2 ;;
    esac >.bench-install.log 2>&1 && echo "bench_setup: $name installed" ||
      echo "bench_setup: $name FAILED: $(tail -n 1 .bench-install.log)"
  done
done
rm -f .bench-install.log
