"""Random blocks of every storage type and what gguf-py makes of them.

    pip install gguf==0.19.0 numpy
    python3 scripts/goldens/quants.py engine/tests/goldens/quants.json

Bytes are random, scale bits too; only half-precision scales that are infinite or NaN are drawn again,
since a model has none. `gguf.rs` expands the same bytes and compares bit for bit.
"""

import base64
import json
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize

SEED = 20250611
# Type, blocks, and the byte offsets of its half-precision numbers.
TYPES = [
    (T.F16, 64, [0]), (T.BF16, 64, []), (T.F32, 32, []),
    (T.Q4_0, 6, [0]), (T.Q4_1, 6, [0, 2]), (T.Q5_0, 6, [0]), (T.Q5_1, 6, [0, 2]), (T.Q8_0, 6, [0]),
    (T.Q2_K, 3, [80, 82]), (T.Q3_K, 3, [108]), (T.Q4_K, 3, [0, 2]), (T.Q5_K, 3, [0, 2]), (T.Q6_K, 3, [208]),
    (T.IQ4_NL, 6, [0]), (T.IQ4_XS, 3, [0]),
]


def random_blocks(rng, kind, count, halves):
    size = GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in halves:
        # The exponent's top bit cleared: finite, from subnormal to 2.
        blocks[:, at + 1] &= 0xBF
    if kind in (T.BF16, T.F32):
        blocks[:, -1] &= 0xBF
    return blocks


def main():
    rng = np.random.default_rng(SEED)
    cases = []
    for kind, count, halves in TYPES:
        blocks = random_blocks(rng, kind, count, halves)
        values = dequantize(blocks.reshape(-1).view(np.float32) if kind == T.F32
                            else blocks.reshape(-1).view(np.float16) if kind == T.F16
                            else blocks.reshape(1, -1), kind).reshape(-1).astype("<f4")
        assert np.isfinite(values).all()
        encode = lambda array: base64.b64encode(array.tobytes()).decode()
        cases.append({"type": kind.name, "blocks": encode(blocks), "values": encode(values)})
    lines = ",\n".join(json.dumps(case) for case in cases)
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        out.write(f'{{"made_by":"scripts/goldens/quants.py, seed {SEED}","types":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
