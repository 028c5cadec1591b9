"""Writes two tiny random models that the logit goldens are made of: a llama with rope_freqs.weight and a qwen3.

    pip install gguf==0.19.0 numpy
    python3 scripts/goldens/tiny.py engine/tests/goldens

They cover what the two demo models do not have: scaled RoPE frequencies, QK norm, SentencePiece, a head
width that is not dim / heads, an output matrix of its own, mixed storage types.
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType as T, GGUFWriter, TokenType
from gguf.quants import quantize

SEED = 20250611
LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 64, 2, 1, 64, 128


def hyperparameters(writer):
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)


def spm(writer):
    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + [f"<0x{b:02X}>" for b in range(256)] + ["▁", "t", "h", "e", "th", "the", "▁the", "a", "o"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(types + [TokenType.NORMAL] * (len(tokens) - len(types)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)


def bpe(writer):
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    character = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = [character[b] for b in range(256)] + ["th", "the", "Ġthe", "<|endoftext|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * 259 + [TokenType.CONTROL] * 2)
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(260)
    writer.add_add_bos_token(False)
    return len(tokens)


def write(path, architecture, rng):
    writer = GGUFWriter(path, architecture)
    hyperparameters(writer)
    writer.add_rope_freq_base(500000.0 if architecture == "llama" else 1000000.0)
    vocab = spm(writer) if architecture == "llama" else bpe(writer)

    def matrix(name, rows, cols, kind, scale=1.0):
        values = (rng.standard_normal((rows, cols)) * scale / np.sqrt(cols)).astype(np.float32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    def norm(name, width, centre=1.0):
        writer.add_tensor(name, (centre + 0.2 * rng.standard_normal(width)).astype(np.float32))

    matrix("token_embd.weight", vocab, DIM, T.Q5_1, 4.0)
    if architecture == "llama":
        factors = np.where(np.arange(HEAD_DIM // 2) < 12, 1.0, np.linspace(1.0, 8.0, HEAD_DIM // 2))
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight", DIM)
        matrix(block + "attn_q.weight", HEADS * HEAD_DIM, DIM, T.Q5_1, 2.0)
        matrix(block + "attn_k.weight", KV_HEADS * HEAD_DIM, DIM, T.Q5_0, 2.0)
        matrix(block + "attn_v.weight", KV_HEADS * HEAD_DIM, DIM, T.Q8_0)
        if architecture == "qwen3":
            norm(block + "attn_q_norm.weight", HEAD_DIM)
            norm(block + "attn_k_norm.weight", HEAD_DIM)
        matrix(block + "attn_output.weight", DIM, HEADS * HEAD_DIM, T.Q4_0, 2.0)
        norm(block + "ffn_norm.weight", DIM)
        matrix(block + "ffn_gate.weight", FFN, DIM, T.Q4_0, 2.0)
        matrix(block + "ffn_up.weight", FFN, DIM, T.Q4_1, 2.0)
        matrix(block + "ffn_down.weight", DIM, FFN, T.Q4_0, 2.0)
    norm("output_norm.weight", DIM, 2.0)
    if architecture == "llama":
        matrix("output.weight", vocab, DIM, T.Q4_1, 2.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    rng = np.random.default_rng(SEED)
    for architecture in ("llama", "qwen3"):
        write(f"{sys.argv[1]}/tiny-{architecture}.gguf", architecture, rng)


if __name__ == "__main__":
    main()
