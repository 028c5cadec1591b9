#!/usr/bin/env bash
# Fetches what the tests of tokenizers and chat templates compare with into models/vocabs:
# vocabulary-only GGUFs and model families' templates, out of the source package of
# llama-cpp-python (PyPI). Needs Python 3 with pip. 77 MB, once.
set -euo pipefail
cd "$(dirname "$0")/.."

package=llama-cpp-python version=0.3.36
archive=llama_cpp_python-$version.tar.gz
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
out=models/vocabs
# Changes with what is taken out of the package.
stamp=$out/.fetched-$version-1

[ -e "$stamp" ] && exit 0
mkdir -p "$out"
work=$(mktemp -d "$out/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "fetching $package $version (77 MB) for vocabularies and templates" >&2
python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary "$package" \
    --dest "$work" "$package==$version"
echo "$sha256  $work/$archive" | sha256sum --check --quiet ||
    { echo "$archive is not the file that was pinned" >&2; exit 1; }

python3 - "$work/$archive" "$out" <<'PYTHON'
import ast, pathlib, sys, tarfile

archive, out = sys.argv[1], pathlib.Path(sys.argv[2])
vocabularies = ["llama-bpe", "gpt-2", "llama-spm", "phi-3"]
templates = {
    "llama-3.1": "meta-llama-Llama-3.1-8B-Instruct",
    "llama-3.2": "meta-llama-Llama-3.2-3B-Instruct",
    "qwen3": "Qwen-Qwen3-0.6B",
    "mistral-nemo": "mistralai-Mistral-Nemo-Instruct-2407",
}
(out / "templates").mkdir(exist_ok=True)
with tarfile.open(archive) as tar:
    top = tar.next().name.split("/")[0]
    read = lambda name: tar.extractfile(f"{top}/{name}").read()
    for name in vocabularies:
        (out / f"ggml-vocab-{name}.gguf").write_bytes(read(f"vendor/llama.cpp/models/ggml-vocab-{name}.gguf"))
    for name, file in templates.items():
        (out / f"templates/{name}.jinja").write_bytes(read(f"vendor/llama.cpp/models/templates/{file}.jinja"))
    # Llama 3's is a constant in the package's own code.
    for node in ast.parse(read("llama_cpp/llama_chat_format.py")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "LLAMA3_INSTRUCT_CHAT_TEMPLATE":
            (out / "templates/llama-3.jinja").write_text(node.value.value)
assert (out / "templates/llama-3.jinja").exists()
PYTHON
touch "$stamp"
