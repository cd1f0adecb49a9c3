"""The streaming kernel reads every word, however many there are and whatever the threads."""

import pytest
import torch

from eepass.codegen.cpu import stream


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 31, 32, 1000, 32 * 256 + 7, 100_003])
def test_every_word_is_in_the_sum(count, threads):
    buffer = stream.StreamBuffer(8 * count)
    assert buffer.sum() == count
    buffer.words.copy_(torch.randint(-(2**62), 2**62, (count,)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert buffer.sum() == int(buffer.words.sum()) % 2**64
    finally:
        torch.set_num_threads(before)


def test_the_buffer_exceeds_the_last_cache(monkeypatch):
    monkeypatch.setattr(stream, "BYTES", 4096)
    monkeypatch.setattr(stream, "_last_cache_bytes", lambda: 65536)
    buffer = stream.StreamBuffer()
    assert buffer.size == stream.CACHES * 65536 == buffer.words.nbytes
    monkeypatch.setattr(stream, "_last_cache_bytes", lambda: 0)
    assert stream.StreamBuffer().size == 4096 and stream.stream_gb_s() > 0


def test_the_best_reading_counts(monkeypatch):
    times = iter([0.0, 4.0, 4.0, 6.0, 6.0, 9.0])
    monkeypatch.setattr(stream, "perf_counter", lambda: next(times))
    assert stream.StreamBuffer(8 * 1000).gb_s(3) == pytest.approx(8000 / 2.0 / 1e9)


def test_without_kernels_it_says_why(monkeypatch):
    monkeypatch.setattr(stream, "load_kernels", lambda: "no C++ compiler was found")
    with pytest.raises(stream.KernelsMissing, match="no C\\+\\+ compiler"):
        stream.stream_gb_s()
