#!/bin/sh
# Run .venv's uv on .venv, with the package index that pip is told to use: uv reads neither PIP_* nor pip's files.
set -eu
cd "$(dirname "$0")/.."
pip_config=$(.venv/bin/python -m pip config list)

# pip_setting NAME: what pip would use, one value per word: its environment, else the section of `install`, else `global`.
pip_setting() {
    for section in ':env:' install global; do
        value=$(printf '%s\n' "$pip_config" | sed -n "s/^$section\.$1='\(.*\)'\$/\1/p")
        if [ -n "$value" ]; then
            printf '%s' "$value" | sed 's/\\n/ /g; s/^ *//; s/  */ /g'
            return
        fi
    done
}

# hand_over VARIABLE NAME: set uv's variable from pip's setting, unless it is set.
hand_over() {
    value=$(pip_setting "$2")
    if [ -n "$value" ] && [ -z "$(printenv "$1")" ]; then
        export "$1=$value"
    fi
}

hand_over UV_DEFAULT_INDEX index-url
hand_over UV_INDEX extra-index-url
hand_over UV_INSECURE_HOST trusted-host
hand_over SSL_CERT_FILE cert
find_links=$(pip_setting find-links | tr ' ' ',')
if [ -n "$find_links" ]; then
    export UV_FIND_LINKS="${UV_FIND_LINKS:-$find_links}"
fi
VIRTUAL_ENV=$PWD/.venv exec .venv/bin/uv "$@"
