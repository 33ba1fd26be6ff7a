"""Tests of compression: bit for bit the same, as small as the theory says, safe with bad files."""

import heapq
import math
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import strategies
from torch import Tensor

from scaletrain import compression
from scaletrain.compression import huffman
from scaletrain.errors import UserError


def pruned(shape: tuple[int, ...], share: float, values: int, seed: int = 0) -> Tensor:
    """Weights of which a share is not zero, with a number of distinct values."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=math.prod(shape))
    weights[random.random(len(weights)) >= share] = 0
    if values:
        kept = weights[weights != 0]
        centres = compression.cluster(kept, values)
        nearest = np.abs(kept[:, None] - centres[None]).argmin(1)
        weights[weights != 0] = centres[nearest]
    return torch.from_numpy(weights.astype(np.float32).reshape(shape))


def there_and_back(tensors: dict[str, Tensor], path: Path) -> compression.Sizes:
    sizes = compression.save(tensors, path)
    loaded = compression.load(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert (
            loaded[name].numpy().tobytes() == tensor.numpy().tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(loaded[name].view(torch.int16), tensor.view(torch.int16))
        )
    return sizes


@pytest.mark.parametrize("share", [0.0, 0.001, 0.08, 0.5, 1.0])
@pytest.mark.parametrize("values", [0, 1, 32])
def test_tensors_come_back_bit_by_bit(share: float, values: int, tmp_path: Path):
    weights = pruned((50, 4, 37), share, values if share else 0)
    there_and_back({"weights": weights, "half": weights.half()}, tmp_path / "file")


def test_odd_tensors_come_back_bit_by_bit(tmp_path: Path):
    special = torch.zeros(5000)
    special[7], special[4999] = -0.0, math.nan
    special[8:12] = torch.tensor([math.inf, -math.inf, 1e-45, 3.0])
    there_and_back(
        {
            "special": special,
            "brain": pruned((70, 70), 0.1, 16).to(torch.bfloat16),
            "zeros": torch.zeros(3000),
            "ones": torch.ones(3000),
            "last": torch.tensor([0.0] * 999 + [1.0]),
            "none": torch.empty(0, 3),
            "scalar": torch.tensor(2.5),
            "integers": torch.arange(4000),
            "flags": torch.tensor([True, False]),
        },
        tmp_path / "file",
    )


def test_a_file_is_as_small_as_its_entropy_allows(tmp_path: Path):
    """Bug it catches: fixed lengths in place of a code, or a table that eats the gain."""
    share, count = 0.08, 300_000
    weights = pruned((count,), share, 32)
    sizes = there_and_back({"weights": weights}, tmp_path / "file")
    kept = weights[weights != 0]
    _, counts = torch.unique(kept, return_counts=True)
    odds = counts / counts.sum()
    of_values = float(-(odds * odds.log2()).sum())
    # A gap between kept weights is geometrically distributed.
    of_gaps = (-share * math.log2(share) - (1 - share) * math.log2(1 - share)) / share
    least = len(kept) * (of_values + of_gaps) / 8
    assert least < sizes.file_bytes < 1.06 * least + 1000
    assert sizes.ratio > 40
    assert sizes.dense_bytes == 4 * count


@hypothesis.given(strategies.lists(strategies.integers(0, 400), min_size=1, max_size=60))
def test_codes_are_as_short_as_huffmans(counts: list[int]):
    used = [count for count in counts if count]
    heap = [*used]
    heapq.heapify(heap)
    least = 0  # the sum of all inner nodes' weights
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        least += both
        heapq.heappush(heap, both)
    assert huffman.num_bits(np.array(counts)) == least


@hypothesis.given(strategies.lists(strategies.integers(0, 20), max_size=3000))
def test_symbols_come_back(symbols: list[int]):
    stream = huffman.encode(np.array(symbols, dtype=np.int64), 21)
    assert huffman.decode(stream, len(symbols)).tolist() == symbols


def test_very_rare_symbols_get_no_longer_codes_than_the_tables_have():
    counts = np.array([1, *(2 ** np.arange(40))])
    lengths = huffman.code_lengths(counts)
    assert lengths.max() <= huffman.MAX_BITS
    assert (0.5 ** lengths.astype(float)).sum() == 1


def test_equal_tensors_give_equal_files(tmp_path: Path):
    tensors = {"weights": pruned((40, 30), 0.2, 8), "bias": torch.ones(3)}
    for number in range(12):
        compression.save(tensors, tmp_path / str(number))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path: Path):
    """Bug it catches: a flipped bit becomes another weight, or an index far outside."""
    path = tmp_path / "file"
    compression.save({"weights": pruned((40, 30), 0.2, 8), "bias": torch.ones(3)}, path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    blob = tensors["weights"]
    for place in range(len(blob)):
        flipped = blob.clone()
        flipped[place] ^= 1 << (place % 8)
        safetensors.torch.save_file(tensors | {"weights": flipped}, path, metadata)
        with pytest.raises(UserError, match="is damaged"):
            compression.load(path)
    for change in (
        ('"num_symbols":', '"num_symbols":9'),
        ("[40,30]", "[400000,300000]"),
        ("[40,30]", "[4,3]"),
        ('"gap_bits":', '"gap_bits":9'),
        ('"float32"', '"object"'),
        ('{"weights"', '{"other"'),
    ):
        coded = metadata[compression.FORMAT].replace(*change)
        assert coded != metadata[compression.FORMAT]
        safetensors.torch.save_file(tensors, path, {compression.FORMAT: coded})
        with pytest.raises(UserError, match="is damaged"):
            compression.load(path)


def test_other_files_are_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "file"
    safetensors.torch.save_file({"weights": torch.ones(3)}, path)
    with pytest.raises(UserError, match="is not compressed"):
        compression.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read"):
        compression.load(path)


def test_centres_are_a_fixed_point_and_keep_the_extremes():
    """Each centre is the mean of the values nearest to it; large values keep their own."""
    random = np.random.default_rng(1)
    values = np.append(random.normal(size=3000), [9.0, -8.0])
    centres = compression.cluster(values, 16)
    nearest = np.abs(values[:, None] - centres[None]).argmin(1)
    for number, centre in enumerate(centres):
        assert centre == pytest.approx(values[nearest == number].mean())
    assert centres[-1] == 9.0 and centres[0] == -8.0


def test_no_cluster_is_lost_where_small_values_are_missing():
    """Bug it catches: centres between the two humps of a pruned layer stay empty."""
    random = np.random.default_rng(2)
    sizes = random.normal(1.0, 0.05, 500)
    values = sizes * random.choice([-1, 1], 500)
    centres = compression.cluster(values, 16)
    assert len(centres) == 16
    assert len(set(np.abs(values[:, None] - centres).argmin(1))) == 16
    assert compression.cluster(np.array([1.0, 2.0, 1.0]), 16).tolist() == [1.0, 2.0]
