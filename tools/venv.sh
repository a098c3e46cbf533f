#!/bin/sh
# Make .venv hold exactly what requirements-dev.txt pins: `make venv`. Every file that is installed has its hash there,
# uv itself included, which pip installs first and which then does the rest in seconds.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found=$("$python" -V 2>/dev/null || echo "no program")
    echo "make venv: Python 3.11 or newer is needed, $python is $found; choose with: make venv PYTHON=python3.12" >&2
    exit 1
fi
rm -f .venv/.synced
if [ "$("$python" -V)" != "$(.venv/bin/python -V 2>/dev/null)" ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    "$python" -m venv --clear .venv
fi
awk '/^uv==/ { found = 1 } found { print; if (!/\\$/) exit }' requirements-dev.txt >.venv/uv.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
    -r .venv/uv.txt
# Compiled now, once: where PYTHONDONTWRITEBYTECODE is set each start would do it anew, 4 s of CPU for the gateway.
tools/uv.sh pip sync --quiet --require-hashes --compile-bytecode requirements-dev.txt
touch .venv/.synced
