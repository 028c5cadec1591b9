"""Measures llama.cpp as `m40llm bench` measures itself; prints one JSON object.

Runs inside the environment that holds llama-cpp-python, through its low-level API. Only the calls that
do work are timed: one llama_decode over the prompt, and one per token when decoding.
"""

import argparse
import ctypes
import json
import random
import statistics
import time

import llama_cpp as lib


def context(model, threads: int, n_ctx: int, n_batch: int):
    params = lib.llama_context_default_params()  # flash attention stays as llama.cpp chooses
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = n_batch
    params.n_threads = params.n_threads_batch = threads
    made = lib.llama_init_from_model(model, params)
    assert made, "llama.cpp made no context"
    return made


def feed(ctx, tokens: list[int]) -> None:
    """Runs the tokens as one batch, positions counted on, logits of the last one only."""
    array = (lib.llama_token * len(tokens))(*tokens)
    status = lib.llama_decode(ctx, lib.llama_batch_get_one(array, len(tokens)))
    assert status == 0, f"llama_decode: {status}"
    lib.llama_synchronize(ctx)


def timed(ctx, batches: list[list[int]]) -> float:
    """Tokens a second over the batches, from an emptied cache."""
    lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
    feed(ctx, [batches[0][0]])
    start = time.perf_counter()
    for tokens in batches:
        feed(ctx, tokens)
    return sum(map(len, batches)) / (time.perf_counter() - start)


@lib.llama_log_callback
def silent(_level, _text, _data):
    """llama.cpp logs the model's metadata at every load."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=1)
    args = parser.parse_args()

    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(args.model.encode(), model_params)
    assert model, f"llama.cpp cannot load {args.model}"
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    ctx = context(model, args.threads, max(1024, args.prompt + args.decode + 64), max(args.prompt, 32))

    draw = random.Random(1)
    prompt = [[draw.randrange(vocab) for _ in range(args.prompt)]]
    decode = [[draw.randrange(vocab)] for _ in range(args.decode)]
    timed(ctx, [prompt[0][:64]])
    timed(ctx, decode[:8])
    result = {
        "prompt": statistics.median(timed(ctx, prompt) for _ in range(args.repetitions)),
        "decode": statistics.median(timed(ctx, decode) for _ in range(args.repetitions)),
        "system": lib.llama_print_system_info().decode(),
        "version": lib.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
