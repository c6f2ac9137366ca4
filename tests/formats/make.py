#!/usr/bin/env python3
"""Makes the fixtures beside this file: random blocks of each weight format, and what PyPI's `gguf` package (0.19.0)
dequantizes them to. Run once; the outputs are kept in the repository.

<format>.blocks  the blocks, random in every bit but for finite scales
<format>.f32     the weights, little-endian floats
"""
import pathlib

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize

HERE = pathlib.Path(__file__).parent
ROWS, COLS = 3, 512
# Per format: bytes in a block, weights in a block, where its f16 scales lie.
FORMATS = {
    "Q8_0": (34, 32, [0]),
    "Q4_1": (20, 32, [0, 2]),
    "Q4_K": (144, 256, [0, 2]),
    "Q6_K": (210, 256, [208]),
    "F16": (2, 1, [0]),
    "F32": (4, 1, []),
}

rng = np.random.default_rng(20240607)
for name, (block_bytes, block_len, scales) in FORMATS.items():
    n = ROWS * COLS // block_len
    blocks = rng.integers(0, 256, size=(n, block_bytes), dtype=np.uint8)
    for at in scales:
        values = rng.uniform(-0.02, 0.02, size=n).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(n, 2)
    if name == "F32":
        blocks = rng.uniform(-1, 1, size=(n, 1)).astype(np.float32).view(np.uint8)
    rows = blocks.reshape(ROWS, -1)
    weights = dequantize(rows, T[name]).astype(np.float32).reshape(-1)
    (HERE / f"{name}.blocks").write_bytes(rows.tobytes())
    (HERE / f"{name}.f32").write_bytes(weights.astype("<f4").tobytes())
