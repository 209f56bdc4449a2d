#!/usr/bin/env bash
# Makes .venv in this checkout with Python 3.11 or newer, and installs there what is named:
#
#   experiments/launch/setup_python.sh -r requirements-tpu.txt
#   experiments/launch/setup_python.sh -e '.[cuda]'
#
# It takes a Python of the machine, if one is new enough (PYTHON names another). Ubuntu 22.04, which
# the TPU images are made of, has 3.10: there uv brings one. uv itself is the file that UV names, one
# called uv in the checkout or on the PATH, or is installed by pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

is_new() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

for name in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    python="$(command -v "$name" || true)"
    if [[ -n "$python" ]] && is_new "$python"; then
        echo "$("$python" --version), $python"
        "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet "$@"
        exit
    fi
done

uv=""
for name in "${UV:-}" ./uv uv .uv/bin/uv "$HOME/.local/bin/uv"; do
    [[ -n "$name" ]] && uv="$(command -v "$name" || true)"
    [[ -n "$uv" ]] && break
done
if [[ -z "$uv" ]]; then
    python3 -m pip install --quiet --target .uv uv ||
        { echo "error: there is no Python 3.11 here, nor uv to bring one; name a file: UV=uv" >&2; exit 2; }
    uv=.uv/bin/uv
fi
echo "no Python 3.11 or newer here: $uv brings one"
"$uv" venv --quiet --python "${PYTHON_VERSION:-3.12}" .venv
VIRTUAL_ENV="$PWD/.venv" "$uv" pip install --quiet "$@"
