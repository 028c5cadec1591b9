# shellcheck shell=bash
# Sets a shell up for work on the kernels:  source scripts/dev-env.sh
#
# Installs the CUDA 12 compiler and the disassembler into .cuda/ if they are missing, puts ptxas and nvdisasm on the PATH, and
# defines
#   kernel NAME    machine code of kernels/NAME.cu: registers, spills and shared memory of each kernel, listing in target/sass
#   m40            the binary with CUDA, built for release
# `micromamba` users set M40LLM_CUDA_HOME=$CONDA_PREFIX beforehand: then nothing is installed but the disassembler.

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    echo "dev-env: source this file instead of running it: source scripts/dev-env.sh" >&2
    exit 1
fi

M40LLM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export M40LLM_ROOT
"$M40LLM_ROOT/scripts/cuda-toolchain.sh" compiler disassembler || return
m40llm_tools=${M40LLM_CUDA_HOME:-$M40LLM_ROOT/.cuda/nvidia/cuda_nvcc}/bin
case :$PATH: in
*:"$m40llm_tools":*) ;;
*) PATH=$m40llm_tools:$M40LLM_ROOT/.cuda/bin:$PATH ;;
esac
unset m40llm_tools

kernel() (
    set -euo pipefail
    cd "$M40LLM_ROOT"
    out=$(python3 scripts/sass_report.py --out-dir)
    mkdir -p target/sass
    ptxas -v -arch=sm_52 "$out/$1.ptx" -o "target/sass/$1.cubin"
    nvdisasm "target/sass/$1.cubin" >"target/sass/$1.sass"
    echo "target/sass/$1.sass"
)

m40() {
    cargo run --quiet --release --manifest-path "$M40LLM_ROOT/Cargo.toml" -p m40llm --features cuda -- "$@"
}
