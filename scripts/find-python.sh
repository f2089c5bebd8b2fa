#!/usr/bin/env bash
# Prints the path of a Python >= 3.12 that can make virtual environments: $PYTHON, then the PATH, then pyenv's versions.
set -u

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

names=(python3.12 python3.13 python3.14 python3 python)
pyenv_versions="${PYENV_ROOT:-$HOME/.pyenv}/versions"

if [ -n "${PYTHON:-}" ]; then
    if fits "$PYTHON"; then
        command -v "$PYTHON"
        exit 0
    fi
    echo "setup: PYTHON=$PYTHON is no Python >= 3.12 with venv; looking further" >&2
fi
for name in "${names[@]}"; do
    if fits "$name"; then
        command -v "$name"
        exit 0
    fi
done
for candidate in "$pyenv_versions"/3.*/bin/python3; do
    if [ -x "$candidate" ] && fits "$candidate"; then
        echo "$candidate"
        exit 0
    fi
done
echo "setup: no Python >= 3.12 with venv found; looked at PYTHON (${PYTHON:-not set}), at ${names[*]} on the PATH and in $pyenv_versions: install Python 3.12 or set PYTHON=/path/to/python3.12" >&2
exit 1
