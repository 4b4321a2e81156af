"""The bytes of DistillKit's compressed log-probabilities and ids (its `DistributionQuantizationConfig`), decoded and encoded.

A position's k entries, by descending probability, are two strings of bytes. Log-probabilities: the first exact_k as floats; then the
coefficients of a least-squares fit over the rank of the others, in the given terms; then bins of quantised residuals, each a scale
and packed integers. Ids: k integers of ceil(log2(d)) bits. Bits are packed with the highest first. With delta_encoding the values are
differences to the entry before.

Encoded is only the form without loss: every entry exact, in float32 (`exact_config`).

Shapes: R positions, K entries, B bytes of a position.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pydantic
from pydantic import Field

from distill.errors import DataError
from distill.records import Array

_CHUNK = 4096
"""Positions unpacked at a time; each takes 8 bytes a bit."""

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_BYTES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class ResidualBin(pydantic.BaseModel):
    """A group of residuals: `num_elements` integers of `element_bits` bits, times one scale."""

    model_config = pydantic.ConfigDict(extra="forbid")

    scale_dtype: Dtype
    element_bits: int = Field(gt=0, le=32)
    num_elements: int = Field(gt=0)


class Compression(pydantic.BaseModel):
    """DistillKit's `logprob_compressor`, with its own names: what `compression_config.yaml` of a data set holds."""

    model_config = pydantic.ConfigDict(extra="forbid")

    d: int = Field(gt=0)
    k: int = Field(gt=0)
    exact_k: int = Field(ge=0)
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[Literal["sqrt", "exp"] | int] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: list[ResidualBin] = []
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        return (self.d - 1).bit_length()

    @property
    def num_bytes(self) -> int:
        """The bytes of a position's log-probabilities."""
        bins = [_BYTES[b.scale_dtype] + -(-b.element_bits * b.num_elements // 8) for b in self.residual_bins]
        terms = len(self.polynomial_terms or []) * _BYTES[self.term_dtype]
        return self.exact_k * _BYTES[self.exact_dtype] + terms + sum(bins)


def exact_config(vocab_size: int, k: int) -> Compression:
    """Return the form in which nothing is lost: k float32 values."""
    return Compression(d=max(vocab_size, 2), k=k, exact_k=k, delta_encoding=False)


def decode_logprobs(bytes_RB: Array, config: Compression) -> Array:
    """Return log-probabilities float32 [R, K]. Raises DataError if the bytes do not fit the configuration."""
    if bytes_RB.shape[1] != config.num_bytes:
        raise DataError(
            f"compressed_logprobs has {bytes_RB.shape[1]} bytes a position, and the compression configuration says "
            f"{config.num_bytes}. Give the configuration that the data set was captured with (compression_config.yaml)."
        )
    reader = _Reader(np.ascontiguousarray(bytes_RB))
    exact_RK = reader.floats(config.exact_k, config.exact_dtype)
    num = config.k - config.exact_k
    rest_RK = np.zeros((len(bytes_RB), num), np.float32)
    if config.polynomial_terms:
        coefficients_RP = reader.floats(len(config.polynomial_terms), config.term_dtype)
        rest_RK += coefficients_RP @ _terms(config, num).T
    start = 0
    for group in config.residual_bins:
        scale_R1 = reader.floats(1, group.scale_dtype)
        levels = reader.integers(group.num_elements, group.element_bits).astype(np.float32)
        shifted = 2 * levels - 1 if group.element_bits == 1 else levels - 2 ** (group.element_bits - 1)
        rest_RK[:, start : start + group.num_elements] += shifted * scale_R1
        start += group.num_elements
    logp_RK = np.concatenate([exact_RK, rest_RK], axis=1)
    return np.cumsum(logp_RK, axis=1, dtype=np.float32) if config.delta_encoding else logp_RK


def decode_ids(bytes_RB: Array, config: Compression) -> Array:
    """Return ids int64 [R, K]. Raises DataError if the bytes do not fit the configuration."""
    expected = -(-config.k * config.id_bits // 8)
    if bytes_RB.shape[1] != expected:
        raise DataError(
            f"bytepacked_indices has {bytes_RB.shape[1]} bytes a position, and {config.k} ids below {config.d} take {expected}. Give "
            "the configuration that the data set was captured with (compression_config.yaml)."
        )
    return _unpacked(bytes_RB, config.k, config.id_bits)


def encode_logprobs(logp_RK: Array) -> Array:
    """Return the bytes of log-probabilities in the form of `exact_config`, uint8 [R, 4 K]."""
    return np.ascontiguousarray(logp_RK, "<f4").view(np.uint8).reshape(len(logp_RK), -1)


def encode_ids(ids_RK: Array, config: Compression) -> Array:
    """Return ids as packed bytes, uint8 [R, B]."""
    bits = config.id_bits
    shifts = np.arange(bits - 1, -1, -1)
    parts = [
        np.packbits(
            ((ids_RK[a : a + _CHUNK, :, None] >> shifts) & 1).astype(np.uint8).reshape(-1, config.k * bits), axis=1
        )
        for a in range(0, len(ids_RK), _CHUNK)
    ]
    return np.concatenate(parts) if parts else np.empty((0, -(-config.k * bits // 8)), np.uint8)


class _Reader:
    """Takes the fields of every position's bytes one after another."""

    def __init__(self, bytes_RB: Array) -> None:
        self.bytes_RB, self.at = bytes_RB, 0

    def floats(self, num: int, dtype: Dtype) -> Array:
        raw = self._take(num * _BYTES[dtype])
        if dtype == "bfloat16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return raw.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]).astype(np.float32)

    def integers(self, num: int, bits: int) -> Array:
        return _unpacked(self._take(-(-num * bits // 8)), num, bits)

    def _take(self, num_bytes: int) -> Array:
        raw = np.ascontiguousarray(self.bytes_RB[:, self.at : self.at + num_bytes])
        self.at += num_bytes
        return raw


def _unpacked(bytes_RB: Array, num: int, bits: int) -> Array:
    values = np.empty((len(bytes_RB), num), np.int64)
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    for start in range(0, len(bytes_RB), _CHUNK):
        part = np.unpackbits(bytes_RB[start : start + _CHUNK], axis=1, count=num * bits)
        values[start : start + _CHUNK] = part.reshape(len(part), num, bits) @ weights
    return values


def _terms(config: Compression, num: int) -> Array:
    """Return the terms of the fit at each rank, float32 [num, P]."""
    ranks = np.linspace(0, 1, num) if config.normalize_t else np.arange(num, dtype=np.float64)
    special = {"sqrt": np.sqrt, "exp": np.exp}
    terms = config.polynomial_terms or []
    columns = [special[term](ranks) if isinstance(term, str) else ranks**term for term in terms]
    return np.stack(columns, axis=1).astype(np.float32)
