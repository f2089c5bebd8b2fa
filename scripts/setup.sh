#!/usr/bin/env bash
# Makes .venv and installs the project with what its tests need. Safe to run again, also after an interruption.
set -u
cd "$(dirname "$0")/.."
venv=.venv
log=$venv/install.log

if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
    python=$(bash scripts/find-python.sh) || exit 1
    echo "setup: making $venv with $python"
    rm -rf "$venv"
    "$python" -m venv "$venv" || { echo "setup: $python could not make $venv" >&2; exit 1; }
fi
echo "setup: installing into $venv (PyTorch and its libraries are several GB; about a minute from a warm cache)"
# Nothing of DeepSpeed is compiled.
if ! DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -e '.[dev]' >"$log" 2>&1; then
    reason=$(grep -E '^ERROR' "$log" | tail -n 1)
    grep -qiE 'connection|resolve|network|timed out|proxy' "$log" && reason="${reason:-pip failed} (is there a network?)"
    echo "setup: pip could not install the dependencies: ${reason:-see the log}; log: $log; run make setup again" >&2
    exit 1
fi
# Transformer Engine's Python files, for the CPU platform's stand-in; nothing is compiled.
if ! "$venv/bin/python" -m counterflow.platform.engine >>"$log" 2>&1; then
    echo "setup: pip could not install Transformer Engine's Python files; log: $log; run make setup again" >&2
    exit 1
fi
touch "$venv/.installed"
echo "setup: done"
