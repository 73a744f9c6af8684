"""Many tensors in one launch: a table on the device that says where they are, how large, and who works on what.

A `Table` is one buffer of 64-bit words:

============  ==============================  =====================================================================
words         content                         changes
============  ==============================  =====================================================================
SETTINGS      float64 settings                when the user changes one
n each        address of every tensor, a row  gradients mostly; parameters and state where they were replaced
              for each operand
n each        elements; elements a program    never for given tensors
              takes; extent of a group
n each        float64 scalars of each tensor  seldom: they are what a tensor's differ by from its companions'
m             tensor and chunk of a program   never for given tensors
============  ==============================  =====================================================================

A row is uploaded when it changed, behind what other streams still read of it.  While a CUDA graph is captured
everything goes to memory that no later step writes to, since the graph will read it whenever it is replayed.  Nobody
tells when a graph is gone, so this memory is kept; a graph that is captured again with the same words shares it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .layout import dense_like, is_dense

__all__ = ["CHUNK", "SETTINGS", "FlatOperands", "Table", "Words", "addresses"]

#: Elements that a program takes: several tiles, so that its scalars are computed once for many elements.
CHUNK = 8192
#: Graphs that may be captured between two eager steps: pinned memory can't be had while one is.
_RESERVES = 4
#: Words at the start of a table.
SETTINGS = 16

Words = NDArray[np.int64]


class Table:
    """A buffer of 64-bit words on ``device``, uploaded row by row."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._rows: list[Words] = []
        self._words: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._reserves: list[Tensor] = []
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._extents = self._programs = np.empty(0, dtype=np.int64)

    def upload(self, rows: Sequence[Words]) -> Tensor:
        """The words of all rows, on the device; only rows that changed since the last call are sent there."""
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            return self._upload_captured(np.concatenate(rows))
        if self._words is None or [row.size for row in rows] != [row.size for row in self._rows]:
            words = np.concatenate(rows)
            self._words = torch.empty(words.size, dtype=torch.int64, device=self._device)
            self._stream = torch.cuda.current_stream(self._device) if self._on_gpu else None
            self._send(words, self._words)
        else:
            self._follow(self._words)
            start = 0
            for row, known in zip(rows, self._rows, strict=True):
                if row is not known and row.tobytes() != known.tobytes():
                    self._send(row, self._words[start : start + row.size])
                start += row.size
        if self._on_gpu:
            self._replenish(self._words.numel())
        self._rows = list(rows)
        return self._words

    def _follow(self, words: Tensor) -> None:
        """Let a step on another stream than the last one's wait for that, which may still read the words."""
        if self._stream is None or torch._C._cuda_getCurrentRawStream(self._device.index) == self._stream.cuda_stream:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        words.record_stream(current)
        self._stream = current

    def _send(self, words: Words, target: Tensor) -> None:
        host = torch.from_numpy(words)
        # The allocator of pinned memory doesn't hand it out again before the copy is done.
        target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)

    def _replenish(self, size: int) -> None:
        """Have enough pinned memory in reserve."""
        if not self._reserves or self._reserves[0].numel() != size:
            self._reserves = list(_pinned(_RESERVES, size).unbind())

    def _upload_captured(self, words: Words) -> Tensor:
        for host, device_words in self._captured:
            if np.array_equal(host.numpy(), words):
                return device_words.copy_(host, non_blocking=True)  # in this graph, too
        if self._reserves and self._reserves[-1].numel() == words.size:
            host = self._reserves.pop()
        else:
            host = _pinned(1, words.size)[0]
        host.copy_(torch.from_numpy(words))
        device_words = torch.empty(words.size, dtype=torch.int64, device=self._device)
        self._captured.append((host, device_words))  # alive, and unchanged, as long as the graph may be replayed
        return device_words.copy_(host, non_blocking=True)

    def programs(self, elements: Words, chunks: Words) -> Words:
        """`program_words`, which are made anew only where tensors or chunks changed since the last call."""
        extents = np.concatenate([elements, chunks])
        if not np.array_equal(extents, self._extents):
            self._extents, self._programs = extents, program_words(elements, chunks)
        return self._programs


def _pinned(count: int, size: int) -> Tensor:
    return torch.empty((count, size), dtype=torch.int64, device="cpu", pin_memory=True)


def program_words(elements: Words, chunks: Words) -> Words:
    """A word for each program: its tensor in the upper half, its chunk of that tensor in the lower."""
    counts = -(-elements // np.maximum(chunks, 1))
    tensors = np.repeat(np.arange(len(elements), dtype=np.int64), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return (tensors << 32) | (np.arange(len(tensors), dtype=np.int64) - first)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each of these begins."""
    return list(map(Tensor.data_ptr, tensors))


class FlatOperands:
    """Operands of many parameters as flat memory: the same place holds the same element in all of one parameter's.

    Whatever order a dense parameter's dimensions have in memory, its gradient and state are walked in it.  An operand
    that lies otherwise is worked on in a copy; `copy_back` returns what was written.  With ``rows`` every index of the
    first dimension must be a run of memory.
    """

    def __init__(self, parameters: Sequence[Tensor], *, rows: bool = False) -> None:
        self._rows = rows
        self._contiguous = all(map(Tensor.is_contiguous, parameters))
        self._strides = [None if self._contiguous else self._order(parameter) for parameter in parameters]
        self._kept: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def _order(self, parameter: Tensor) -> tuple[int, ...] | None:
        """Strides to walk a parameter in; None where it is contiguous."""
        if parameter.is_contiguous():
            return None
        if not is_dense(parameter) or (self._rows and parameter.stride(0) * parameter.shape[0] != parameter.numel()):
            return torch.empty_like(parameter, device="meta", memory_format=torch.contiguous_format).stride()
        return parameter.stride()

    def addresses(self, operands: Sequence[Tensor], *, written: bool = True) -> Words:
        """A row of the table: the operands' addresses, or those of their copies."""
        if not (self._contiguous and all(map(Tensor.is_contiguous, operands))):
            operands = [
                self._laid_out(operand, strides, written)
                for operand, strides in zip(operands, self._strides, strict=True)
            ]
        return np.array(addresses(operands), dtype=np.int64)

    def _laid_out(self, operand: Tensor, strides: tuple[int, ...] | None, written: bool) -> Tensor:
        if strides is None:
            if operand.is_contiguous():
                return operand
            strides = torch.empty_like(operand, device="meta", memory_format=torch.contiguous_format).stride()
        flat = dense_like(operand, strides)
        if flat is not operand:
            self._kept.append(flat)
            if written:
                self._copies.append((operand, flat))
        return flat

    @property
    def copied(self) -> bool:
        """Whether an operand is worked on in a copy."""
        return bool(self._kept)

    def copy_back(self) -> None:
        """After the launch: give operands that were worked on in a copy what was written there."""
        for operand, copy in self._copies:
            operand.copy_(copy)
