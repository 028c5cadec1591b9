#!/usr/bin/env bash
# Builds the image as docker/Dockerfile says, without a daemon or a registry, starts its process and lets openai-python
# chat with it. Prints the image's size and how long it takes to start.
# Usage: tests/container/run.sh MODEL.gguf WORK-DIRECTORY
#
# buildah builds, with bases that debootstrap makes; Rust is this machine's, crates come from `cargo vendor`, the kernels'
# compiler from .cuda/. So the build itself is offline. Wants root (chroot) and Debian's packages, which it installs.
set -euo pipefail

fail() { echo "container: $*" >&2; exit 1; }
[ $# -eq 2 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
model=$(realpath "$1")
mkdir -p "$2" && work=$(realpath "$2")
[ "$(id -u)" = 0 ] || fail "root is needed, to build without a daemon (buildah --isolation chroot)"
if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends buildah debootstrap
fi
# Images and containers stay below the work directory.
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }
present() { buildah inspect --type image "localhost/$1" >/dev/null 2>&1; }

# A base from Debian's own packages, less what an image does not need.
base() { # NAME PACKAGE,...
    local dir=$work/base container
    rm -rf "$dir"
    debootstrap --variant=minbase --include="$2" bookworm "$dir" >"$work/debootstrap.log" 2>&1 ||
        fail "debootstrap failed: $(tail -n 3 "$work/debootstrap.log")"
    rm -rf "$dir"/usr/share/{doc,man,info,locale,lintian} "$dir"/var/{lib/apt/lists,cache/apt}/* "$dir"/var/log/*
    [ -z "${3:-}" ] || "$3" "$dir"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$dir" / >/dev/null
    buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit --quiet "$container" "localhost/$1" >/dev/null
    buildah rm "$container" >/dev/null
    rm -rf "$dir"
}
with_rust() {
    tar -C "$(rustc --print sysroot)" --exclude=./share/doc --exclude=./lib/rustlib/src -c . | tar -C "$1/usr/local" -x
}

# The client that the suite pins, and Kubernetes' schemas.
venv=$work/venv
packages="$(grep '^openai==' "$root/tests/clients/requirements.txt") kubernetes-validate==1.37.0"
if [ "$(cat "$venv/packages" 2>/dev/null)" != "$packages" ]; then
    python3 -m venv "$venv"
    # shellcheck disable=SC2086 # two words
    "$venv/bin/pip" install --quiet --disable-pip-version-check $packages
    echo "$packages" >"$venv/packages"
fi
# The newest version that the package knows, and the oldest.
for version in 1.37.0 1.25.0; do
    "$venv/bin/kubernetes-validate" --kubernetes-version "$version" --strict "$root/docker/kubernetes/m40llm.yaml"
done

present run-base || base run-base ca-certificates
present build-base || base build-base gcc,libc6-dev,python3-pip,ca-certificates with_rust

# What a clean clone and its dependencies are. The lock file names the crates: vendored once for each.
context=$work/context
crates=$work/crates-$(sha256sum "$root/Cargo.lock" | cut -c1-16)
if [ ! -e "$crates/done" ]; then
    rm -rf "$work"/crates-*
    mkdir -p "$crates"
    (cd "$root" && cargo vendor --locked --versioned-dirs "$crates/vendor" 2>"$work/vendor.log") >"$crates/config.toml"
    sed -i 's|^directory = .*|directory = "vendor"|' "$crates/config.toml"
    touch "$crates/done"
fi
rm -rf "$context"
mkdir -p "$context/.cargo"
(cd "$root" && git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ -f "$file" ] && printf '%s\0' "$file"; done |
    tar -c --null -T -) | tar -C "$context" -x
cp "$crates/config.toml" "$context/.cargo/config.toml"
printf '[net]\noffline = true\n' >>"$context/.cargo/config.toml"
cp -al "$crates/vendor" "$context/vendor"
mkdir -p "$context/.cuda"
cp -a "$root/.cuda/nvidia" "$root/.cuda/compiler.version" "$context/.cuda/"

echo "container: building (several minutes)" >&2
started=$SECONDS
buildah build --isolation chroot --format docker --pull-never \
    --build-arg "REVISION=$(git -C "$root" rev-parse --short=12 HEAD)" \
    --build-arg BUILD_BASE=localhost/build-base --build-arg RUN_BASE=localhost/run-base \
    -f "$context/docker/Dockerfile" -t localhost/m40llm "$context" >"$work/build.log" 2>&1 ||
    fail "the build failed: $(tail -n 30 "$work/build.log")"
echo "container: built in $((SECONDS - started)) s" >&2

"$venv/bin/python" "$root/tests/container/image.py" "$work" localhost/m40llm localhost/run-base "$model"
