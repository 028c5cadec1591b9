#!/usr/bin/env bash
# cuda-toolchain.sh [compiler|disassembler]...: puts what builds and inspects the kernels into .cuda/, from PyPI.
#
#   compiler      NVRTC, ptxas and the headers of CUDA 12.9, the last series that compiles for sm_52 (default)
#   disassembler  the nvdisasm of triton 3.3.1: later ones no longer read sm_52
#
# Versions are pinned; what is there already is left alone, and no compiler is installed where M40LLM_CUDA_HOME names one.
# Needs python3 with pip.
set -euo pipefail

fail() { echo "cuda-toolchain: $*" >&2; exit 1; }

dir=$(cd "$(dirname "$0")/.." && pwd)/.cuda
compiler=(nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-nvcc-cu12==12.9.86 nvidia-cuda-runtime-cu12==12.9.79)
triton=triton==3.3.1

# What a part stands for is written last, so that an interrupted run is not taken for a finished one.
present() { [ "$(cat "$dir/$1.version" 2>/dev/null)" = "$2" ]; }

pip() {
    python3 -m pip --version >/dev/null 2>&1 || fail "pip is needed (python3 -m pip does not run)"
    PIP_ROOT_USER_ACTION=ignore \
        python3 -m pip "$@" --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: >&2
}

install_compiler() {
    # The build takes the compiler from there, and from nowhere else.
    [ -z "${M40LLM_CUDA_HOME:-}" ] || return 0
    present compiler "${compiler[*]}" && return
    echo "cuda-toolchain: installing ${compiler[*]} into $dir (about 140 MB to download)" >&2
    mkdir -p "$dir"
    work=$(mktemp -d "$dir/.install-XXXXXX")
    pip install --quiet --target "$work" "${compiler[@]}" || fail "pip could not install the compiler"
    [ -x "$work/nvidia/cuda_nvcc/bin/ptxas" ] || fail "the wheels hold no ptxas for this machine"
    rm -rf "$dir/nvidia"
    mv "$work/nvidia" "$dir/nvidia"
    echo "${compiler[*]}" >"$dir/compiler.version"
}

# Only the wheel's nvdisasm is kept: the rest is half a gigabyte that nothing here uses.
install_disassembler() {
    present disassembler "$triton" && return
    echo "cuda-toolchain: fetching nvdisasm out of $triton (about 155 MB to download)" >&2
    mkdir -p "$dir/bin"
    work=$(mktemp -d "$dir/.install-XXXXXX")
    # The wheel's Python version does not matter to a program inside it.
    pip download --quiet --dest "$work" --python-version 3.11 "$triton" || fail "pip could not download $triton"
    python3 - "$work" "$dir/bin/nvdisasm" <<'PY' || fail "$triton holds no nvdisasm"
import glob, os, shutil, sys, zipfile

work, target = sys.argv[1:]
(wheel,) = glob.glob(f"{work}/*.whl")
with zipfile.ZipFile(wheel) as archive, archive.open("triton/backends/nvidia/bin/nvdisasm") as source:
    with open(f"{work}/nvdisasm", "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
os.chmod(f"{work}/nvdisasm", 0o755)
os.replace(f"{work}/nvdisasm", target)
PY
    echo "$triton" >"$dir/disassembler.version"
}

work=
trap 'if [ -n "$work" ]; then rm -rf "$work"; fi' EXIT
trap 'exit 130' INT TERM
for part in "${@:-compiler}"; do
    case $part in
    compiler) install_compiler ;;
    disassembler) install_disassembler ;;
    *) fail "usage: $0 [compiler|disassembler]..." ;;
    esac
    [ -z "$work" ] || rm -rf "$work"
    work=
done
