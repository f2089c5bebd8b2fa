#!/usr/bin/env bash
# Prints the path of a Chromium: $COUNTERFLOW_BROWSER, then the PATH; as root on Debian it installs one where none is there.
set -u

find_browser() {
    local name
    for name in ${COUNTERFLOW_BROWSER:+"$COUNTERFLOW_BROWSER"} chromium chromium-browser google-chrome; do
        command -v "$name" && return 0
    done
    return 1
}

install_browser() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    export DEBIAN_FRONTEND=noninteractive
    timeout 60 apt-get -qq update >/dev/null 2>&1
    timeout 240 apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1
}

find_browser && exit 0
if install_browser; then
    find_browser && exit 0
fi
echo "browser: no chromium found or installed; tests of the report page are skipped: install chromium or set COUNTERFLOW_BROWSER=/path/to/chromium" >&2
exit 1
