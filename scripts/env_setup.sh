#!/usr/bin/env bash
# Make .venv with all that training, the demo and the tests need.
#
#   scripts/env_setup.sh            about 3 minutes and 6 GB (PyTorch with CUDA)
#   PYTHON=python3.12 scripts/env_setup.sh
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" - <<'PY' || { echo "env_setup: Python 3.10 or newer is needed; set PYTHON=/path/to/it" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 10))
PY
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv ||
    { echo "env_setup: cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 2; }
fi
echo "env_setup: installing packages into .venv (about 3 minutes the first time)"
# setuptools warns of every editable installation, whatever there is in the folder.
PYTHONWARNINGS=ignore .venv/bin/pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable '.[demo,dev]'

# Pillow-SIMD resizes two to four times faster than Pillow. Both write the same folder, and whatever
# needs Pillow brings it back, so this is the last step, and we look which one is there in the end.
simd=12.1.1.post0
flags=
if grep -qsw avx2 /proc/cpuinfo; then flags="-mavx2"; fi
if [ "$(uname -m)" = x86_64 ] &&
  CC="cc $flags" .venv/bin/pip install --quiet --disable-pip-version-check \
    --force-reinstall --no-deps "pillow-simd==$simd" >.venv/pillow-simd.log 2>&1 &&
  [ "$(.venv/bin/python -c 'import PIL; print(PIL.__version__)')" = "$simd" ]; then
  echo "env_setup: Pillow-SIMD $simd ($flags)"
else
  .venv/bin/pip uninstall --quiet --yes pillow-simd 2>/dev/null || true
  .venv/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "pillow==${simd%.post0}"
  echo "env_setup: plain Pillow ${simd%.post0}: Pillow-SIMD could not be built here (see .venv/pillow-simd.log; it needs x86-64, a C compiler and the headers of libjpeg and zlib). All works, more slowly."
fi
.venv/bin/python -c '
from loaders.decode import decoder_name
print("env_setup: images are decoded by the", decoder_name())'
touch .venv/ready
