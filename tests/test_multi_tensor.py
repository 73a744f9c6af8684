"""Tables of many tensors: what captured graphs and other streams still read isn't written to.  On made-up streams."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusednn.kernels.base import multi_tensor
from fusednn.kernels.base.multi_tensor import Table


class Stream:
    """A stream that notes for whom it waited."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waited: list[int] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other.cuda_stream)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of CUDA as a table asks for; memory is the CPU's."""
    gpu = SimpleNamespace(capturing=False, stream=Stream(1), pinned=0)

    def pinned(count: int, size: int) -> torch.Tensor:
        assert not gpu.capturing, "pinned memory can't be had while a graph is captured"
        gpu.pinned += count
        return torch.empty((count, size), dtype=torch.int64)

    monkeypatch.setattr(multi_tensor, "_pinned", pinned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.stream)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: gpu.stream.cuda_stream, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda words, stream: None)
    return gpu


@pytest.fixture
def table(gpu: Any) -> Table:
    table = Table(torch.device("cpu"))
    table._on_gpu = True
    return table


def rows(*numbers: int) -> list[multi_tensor.Words]:
    return [np.array([number, number], dtype=np.int64) for number in numbers]


def test_graphs_have_words_of_their_own(table: Table, gpu: Any) -> None:
    table.upload(rows(1, 2))
    gpu.capturing = True
    captured = [table.upload(rows(1, number)) for number in (3, 4, 5)]
    gpu.capturing = False
    assert table.upload(rows(8, 9)).tolist() == [8, 8, 9, 9]
    assert [words.tolist() for words in captured] == [[1, 1, number, number] for number in (3, 4, 5)]
    gpu.capturing = True
    assert table.upload(rows(1, 7)).tolist() == [1, 1, 7, 7]


def test_a_graph_that_is_captured_again_takes_no_more_memory(table: Table, gpu: Any) -> None:
    table.upload(rows(1, 2))
    pinned = gpu.pinned
    gpu.capturing = True
    first = table.upload(rows(1, 3))
    for _ in range(20):
        first.zero_()
        again = table.upload(rows(1, 3))
        assert again.tolist() == [1, 1, 3, 3]  # uploaded by each graph: the first needn't be replayed
        assert again.data_ptr() == first.data_ptr()
    assert gpu.pinned == pinned
    assert len(table._captured) == 1


def test_another_stream_waits_for_the_last_one(table: Table, gpu: Any) -> None:
    first, second = gpu.stream, Stream(2)
    table.upload(rows(1, 2))
    table.upload(rows(1, 3))
    assert first.waited == []
    gpu.stream = second
    table.upload(rows(1, 4))
    table.upload(rows(1, 5))
    assert second.waited == [1]
    gpu.stream = first
    table.upload(rows(1, 5))
    assert first.waited == [2]
