"""Vectors of texts as llama.cpp computes them in F32, by the mean of all tokens and by the last one.

    pip install gguf==0.19.0 numpy llama-cpp-python==0.3.36
    python3 scripts/goldens/embeddings.py models/smollm2-135m-instruct-q4_1.gguf engine/tests/goldens/embeddings-smollm2.json

Tensors are expanded to F32 first, as for the logits. `embeddings.rs` compares.
"""

import argparse
import json
import os
import tempfile

import llama_cpp

from logits import CODE, LONG, PLAIN, WIDE, to_f32

TEXTS = {"plain": PLAIN, "code": CODE, "long": LONG, "wide": WIDE}
POOLINGS = {"mean": llama_cpp.LLAMA_POOLING_TYPE_MEAN, "last": llama_cpp.LLAMA_POOLING_TYPE_LAST}


def vectors(path, pooling, threads):
    """The token ids and the normalised vector of each text."""
    model = llama_cpp.Llama(
        path, embedding=True, pooling_type=pooling, n_ctx=1024, n_batch=1024, n_ubatch=1024, n_threads=threads,
        n_threads_batch=threads, type_k=0, type_v=0, flash_attn=False, verbose=False,
    )
    ids = {name: model.tokenize(text.encode(), add_bos=True, special=True) for name, text in TEXTS.items()}
    return ids, {name: model.embed(text, normalize=True) for name, text in TEXTS.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "f32.gguf")
        to_f32(args.model, path)
        found = {name: vectors(path, pooling, args.threads) for name, pooling in POOLINGS.items()}
    cases = [
        {"name": name, "prompt": found["mean"][0][name]}
        | {pooling: [round(x, 6) for x in found[pooling][1][name]] for pooling in POOLINGS}
        for name in TEXTS
    ]
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    about = f"scripts/goldens/embeddings.py, llama-cpp-python {llama_cpp.__version__}, F32 weights and KV"
    with open(args.output, "w", encoding="utf-8") as out:
        out.write(f'{{"made_by":{json.dumps(about)},"texts":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
