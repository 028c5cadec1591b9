"""Log-probabilities and greedy continuations of a GGUF model as llama.cpp computes them in F32.

    pip install gguf==0.19.0 numpy llama-cpp-python==0.3.36
    python3 scripts/goldens/logits.py models/smollm2-135m-instruct-q4_1.gguf engine/tests/goldens/logits-smollm2.json

Every tensor is expanded to F32 first, and keys and values are F32, so that nothing but the order of
float additions separates llama.cpp from the engine's reference. `logits.rs` compares.
"""

import argparse
import json
import os
import tempfile

import gguf
import llama_cpp
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

SEED = 20250611
TOP = 20
OTHERS = 20
POSITIONS = 6
CONTINUATION = 64

PLAIN = "The capital of France is Paris, and the capital of Italy is"
CODE = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n    return '
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nName three rivers in Europe.<|im_end|>\n<|im_start|>assistant\n"
)
LONG = (
    "A lighthouse keeper writes down the weather every evening. On Monday the wind came from the west and the "
    "sea was calm. On Tuesday a storm broke over the rocks, and the lamp burned all night long. On Wednesday "
    "three ships passed, two of them bound for the north, one of them slow and low in the water. "
) * 4
WIDE = "東京は日本の首都です。你好，世界！ 안녕하세요 👩‍👩‍👧‍👦🚀 naïve café — здравствуй, мир"
REPEATED = "la " * 48


def to_f32(source, target):
    """Writes `source` with every tensor expanded to F32, metadata kept but for the file type."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tuple(reversed(tensor.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


class Oracle:
    """llama.cpp with F32 weights, keys and values."""

    def __init__(self, path, threads):
        self.model = llama_cpp.Llama(
            path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, type_k=0, type_v=0,
            flash_attn=False, logits_all=True, verbose=False,
        )
        self.vocab = self.model.n_vocab()

    def tokens(self, text):
        return self.model.tokenize(text.encode(), add_bos=True, special=True)

    def logits(self, tokens, first):
        """Runs `tokens` after what was run before (`first`: after nothing); `[len(tokens), vocab]`."""
        if first:
            self.model.reset()
            self.model._ctx.kv_cache_clear()
        self.model.eval(tokens)
        end = self.model.n_tokens
        return self.model.scores[end - len(tokens):end].copy()


def rounded(values):
    return [round(float(v), 5) for v in values]


def golden(oracle, name, prompt, rng):
    logits = oracle.logits(prompt, first=True)
    scores = [log_softmax(row) for row in logits]
    last = len(prompt) - 1
    positions = []
    for at in sorted({int(p) for p in np.linspace(min(1, last), last, POSITIONS)}):
        top = np.argsort(-scores[at], kind="stable")[:TOP]
        others = np.sort(rng.choice(oracle.vocab, OTHERS, replace=False))
        positions.append({
            "at": at,
            "top": [[int(t), round(float(scores[at][t]), 5)] for t in top],
            "others": [[int(t), round(float(scores[at][t]), 5)] for t in others],
        })
    continuation, margins, row = [], [], logits[-1]
    for _ in range(CONTINUATION):
        second, best = np.argsort(row, kind="stable")[-2:]
        continuation.append(int(best))
        margins.append(round(float(row[best] - row[second]), 4))
        row = oracle.logits([int(best)], first=False)[-1]
    own = rounded(scores[i][prompt[i + 1]] for i in range(last))
    return {
        "name": name, "prompt": prompt, "own": own, "positions": positions,
        "continuation": continuation, "margins": margins,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "f32.gguf")
        to_f32(args.model, path)
        oracle = Oracle(path, args.threads)
        texts = {"plain": PLAIN, "code": CODE, "chat": CHAT, "long": LONG, "wide": WIDE, "repeated": REPEATED}
        prompts = {name: oracle.tokens(text)[:300] for name, text in texts.items()}
        cases = [golden(oracle, name, prompt, rng) for name, prompt in prompts.items()]
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    about = f"scripts/goldens/logits.py, llama-cpp-python {llama_cpp.__version__}, F32 weights and KV, seed {SEED}"
    with open(args.output, "w", encoding="utf-8") as out:
        out.write(f'{{"made_by":{json.dumps(about)},"vocab":{oracle.vocab},"prompts":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
