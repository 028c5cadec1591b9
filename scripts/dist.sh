#!/usr/bin/env bash
# dist.sh BINARY DIR: puts into DIR what a release consists of, beside the image:
#
#   m40llm-VERSION-ARCH-linux.tar.gz   the binary, completions, manual pages, licence
#   m40llm-VERSION.cdx.json            what the binary is made of (CycloneDX)
#   m40llm-VERSION-notes.md            this version's part of CHANGELOG.md
#   SHA256SUMS                         checksums of the first two
#
# The same binary and commit make the same archive, byte for byte. Installs cargo-cyclonedx where it is missing.
set -euo pipefail

fail() { echo "dist: $*" >&2; exit 1; }
[ $# -eq 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
binary=$(realpath "$1")
mkdir -p "$2" && out=$(realpath "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# `m40llm 0.1.0 (1a2b3c4d5e6f)`
read -r _ version _ <<<"$("$binary" --version)"
packaged=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$root/Cargo.toml")
[ "$version" = "$packaged" ] || fail "$binary is version $version and Cargo.toml says $packaged"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

# The section under `## VERSION`, or `## VERSION (date)`, up to the next one.
awk -v version="$version" '/^## /{ found = $2 == version; next } found' "$root/CHANGELOG.md" >"$work/notes.md"
grep -q '[^[:space:]]' "$work/notes.md" || fail "CHANGELOG.md says nothing under '## $version'"
cp "$work/notes.md" "$out/m40llm-$version-notes.md"

# A command's manual page, then those of the commands that it lists.
manual() { # COMMAND...
    local page name
    page=$(IFS=-; echo "m40llm${*:+-$*}")
    "$binary" man "$@" >"$tree/man/$page.1"
    # roff writes `m40llm\-keys\-create(1)`.
    for name in $(tr -d '\\' <"$tree/man/$page.1" | sed -n "s/^$page-\([a-z0-9-]*\)(1)\$/\1/p"); do
        manual "$@" "$name"
    done
}

name=m40llm-$version-$(uname -m)-linux
tree=$work/$name
mkdir -p "$tree/man" "$tree/completions"
install -m 0755 "$binary" "$tree/m40llm"
cp "$root/LICENSE" "$root/README.md" "$root/CHANGELOG.md" "$tree/"
"$binary" completions bash >"$tree/completions/m40llm.bash"
"$binary" completions zsh >"$tree/completions/_m40llm"
"$binary" completions fish >"$tree/completions/m40llm.fish"
manual
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --mtime="@$SOURCE_DATE_EPOCH" \
    -c "$name" | gzip -9n >"$out/$name.tar.gz"

# The tool writes beside each Cargo.toml, so it gets a copy of those.
command -v cargo-cyclonedx >/dev/null || cargo install --quiet --locked --version '^0.5.9' cargo-cyclonedx
mkdir "$work/source"
git -C "$root" ls-files -z -- Cargo.toml Cargo.lock build.rs api engine kernels |
    tar -C "$root" -c --null -T - | tar -C "$work/source" -x
(cd "$work/source" && cargo cyclonedx --quiet --manifest-path api/Cargo.toml --features cuda --format json \
    --spec-version 1.5 --target "$(uname -m)-unknown-linux-gnu" --describe binaries)
# Our own crates are named by their paths, which are this copy's.
sed "s|file://$work/source/|file:///|g" "$work/source/api/m40llm_bin.cdx.json" >"$out/m40llm-$version.cdx.json"

(cd "$out" && sha256sum "$name.tar.gz" "m40llm-$version.cdx.json" >SHA256SUMS)
ls -l "$out" >&2
