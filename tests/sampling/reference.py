"""What the sampler should do, written a second time: numpy, float64, one row at a time, no code shared."""

from __future__ import annotations

import numpy as np

Row = np.ndarray
U32 = 0xFFFFFFFF


def temperature(row: Row, temperature: float) -> Row:
    return row if temperature < 1e-5 else row / np.float64(np.float32(temperature))


def probabilities(row: Row) -> Row:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def top_k_kept(row: Row, top_k: int) -> Row:
    if top_k <= 0 or top_k >= len(row):
        return np.ones(len(row), dtype=bool)
    return np.array([(row > value).sum() < top_k for value in row])


def top_p_share_above(row: Row) -> Row:
    """For each token, the probability of all strictly likelier ones."""
    p = probabilities(row)
    return np.array([p[row > value].sum() for value in row])


def penalties(
    row: Row,
    prompt: list[int],
    output: list[int],
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Row:
    out = row.copy()
    for token in set(prompt) | set(output):
        out[token] = out[token] / repetition_penalty if out[token] > 0 else out[token] * repetition_penalty
    for token in set(output):
        out[token] -= frequency_penalty * output.count(token) + presence_penalty
    return out


def bad_words(row: Row, output: list[int], sequences: list[list[int]]) -> Row:
    out = row.copy()
    for *prefix, last in sequences:
        if len(prefix) <= len(output) and output[len(output) - len(prefix) :] == prefix:
            out[last] = -np.inf
    return out


# The draw, on Python integers.


def philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & U32, (a >> 32) ^ c[3] ^ k[1], a & U32]
        k = [(k[0] + 0x9E3779B9) & U32, (k[1] + 0xBB67AE85) & U32]
    return c


def draw_key(seed: int, position: int, sample_index: int) -> tuple[int, int]:
    seed &= (1 << 64) - 1
    words = philox([position & U32, position >> 32, sample_index, 0x64726177], [seed & U32, seed >> 32])
    return words[0], words[1]


def noise_bits(key: tuple[int, int], ids: np.ndarray) -> np.ndarray:
    """uint32 arithmetic, which wraps."""
    h = ids.astype(np.uint32) ^ np.uint32(key[0])
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= np.uint32(key[1])
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def uniform(bits: np.ndarray) -> np.ndarray:
    return np.clip(bits.astype(np.float32) * np.float32(2**-32), np.float32(2**-33), np.float32(1 - 2**-24))


def gumbel(bits: np.ndarray) -> np.ndarray:
    """float64 from the float32 uniforms."""
    return -np.log(-np.log1p(-uniform(bits).astype(np.float64)))
