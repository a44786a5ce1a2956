#!/usr/bin/env bash
# Make the virtual environment $1 (default .venv) with pairmill and everything that development, tests and
# the demo need, at the versions of constraints.txt. Run by the Makefile; safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}

say() { printf 'setup: %s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "no Python 3.11, 3.12 or 3.13 was found. Install one (Debian, Ubuntu: apt-get install python3.11),"
    say "or name it: make setup PYTHON=/path/to/python3.11"
    exit 1
}

make_venv() {
    "$python" -m venv --clear "$venv"
}

python=$(find_python)
say "virtual environment $venv with $("$python" --version)"
# Debian splits ensurepip off into python3-venv: without it `venv` fails half way.
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
    say "this Python cannot make virtual environments; installing python$version-venv"
    if ! { "${as_root[@]}" apt-get update -qq && "${as_root[@]}" apt-get install -y -qq "python$version-venv"; } >&2; then
        say "that failed. Install it by hand (sudo apt-get install python$version-venv) and run this again."
        exit 1
    fi
fi
make_venv

# uv resolves and unpacks in seconds what takes pip minutes, but does not read pip's find-links, where a
# machine may keep a CPU build of torch: hand them over, or uv would fetch the CUDA build.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
links=${PIP_FIND_LINKS:-$("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)}
if [ -n "$links" ]; then
    UV_FIND_LINKS=$(tr -s '[:space:]' ',' <<<"$links" | sed 's/,$//')
    export UV_FIND_LINKS
fi
index=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
if [ -n "$index" ]; then
    export UV_DEFAULT_INDEX=$index
fi
say "installing pairmill[dev] (constraints.txt)"
wanted=(--quiet --editable '.[dev]' --constraint constraints.txt)
# Compiled here once, as pip does, and not by the first processes that import torch, each for itself.
if ! "$venv/bin/uv" pip install --compile-bytecode --python "$venv/bin/python" "${wanted[@]}"; then
    say "uv could not install it (see above); trying pip, which takes minutes"
    "$venv/bin/python" -m pip install "${wanted[@]}"
fi
say "ready"
