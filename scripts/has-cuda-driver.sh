#!/usr/bin/env bash
# has-cuda-driver.sh: exit code 0 where NVIDIA's driver library is installed, so that a CUDA build is worth its time.
set -euo pipefail

# /sbin is not on every user's path.
PATH=$PATH:/usr/sbin:/sbin
if command -v ldconfig >/dev/null && [[ "$(ldconfig -p 2>/dev/null)" == *libcuda.so.1* ]]; then
    exit 0
fi
IFS=: read -ra listed <<<"${LD_LIBRARY_PATH:-}"
for dir in "${listed[@]}" /usr/lib/x86_64-linux-gnu /usr/lib/aarch64-linux-gnu /usr/lib64 /usr/lib /usr/lib/wsl/lib \
    /usr/local/nvidia/lib64 /run/opengl-driver/lib; do
    if [ -n "$dir" ] && [ -e "$dir/libcuda.so.1" ]; then
        exit 0
    fi
done
exit 1
