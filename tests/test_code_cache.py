import dataclasses
import errno

import pytest
import torch

from progressive_vae.data.code_cache import GridDataset, Manifest, cached, write_cache

MANIFEST = Manifest(weights="abc", dataset="d", split="train", shape=(2, 3), num_values=300)


def batches(count=5, size=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield (
            torch.randint(300, (size, 2, 3), generator=generator),
            torch.randint(10, (size,), generator=generator),
        )


def test_a_cache_holds_the_grids_and_labels_that_were_written(tmp_path):
    write_cache(tmp_path / "cache", MANIFEST, batches())
    dataset = GridDataset(tmp_path / "cache", MANIFEST)
    grids, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    assert len(dataset) == 20 and MANIFEST.dtype == "uint16"
    read = dataset.batch(slice(0, 20))
    assert torch.equal(read[0], grids) and torch.equal(read[1], labels)
    rows = dataset.__getitems__([7, 3])
    assert torch.equal(rows[0]["grid"], grids[7]) and rows[1]["label"] == labels[3]
    assert rows[0]["grid"].dtype == torch.int64
    assert [len(g) for g, _ in dataset.batches(8)] == [8, 8, 4]


def test_pixels_of_training_examples_are_bytes(tmp_path):
    pixels = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    manifest = dataclasses.replace(MANIFEST, shape=(3, 4, 5), num_values=256)
    write_cache(tmp_path / "cache", manifest, [(pixels, torch.zeros(2, dtype=torch.long))])
    dataset = GridDataset(tmp_path / "cache")
    example = dataset[1]["grid"]
    assert example.dtype == torch.uint8 and torch.equal(example.long(), pixels[1])
    assert dataset.batch([1])[0].dtype == torch.int64


@pytest.mark.parametrize(
    "change", [dict(weights="def"), dict(dataset="e"), dict(split="test"), dict(shape=(3, 2))]
)
def test_another_manifest_raises(tmp_path, change):
    write_cache(tmp_path / "cache", MANIFEST, batches())
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"expected .*{name}.*got .*{name}.*--overwrite_cache"):
        GridDataset(tmp_path / "cache", dataclasses.replace(MANIFEST, **change))


def test_an_interrupted_write_leaves_no_cache(tmp_path):
    def interrupted():
        yield from batches(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cache", MANIFEST, interrupted())
    with pytest.raises(ValueError, match="got no manifest.json"):
        GridDataset(tmp_path / "cache", MANIFEST)
    write_cache(tmp_path / "cache", MANIFEST, batches())
    assert len(GridDataset(tmp_path / "cache")) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_foreign_files_are_not_deleted(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder for a cache"):
        write_cache(tmp_path / "cache", MANIFEST, batches())
    assert (tmp_path / "cache" / "mine.txt").is_file()


def test_an_empty_split_raises(tmp_path):
    with pytest.raises(ValueError, match="at least one example in split 'train'"):
        write_cache(tmp_path / "cache", MANIFEST, [])


def test_cached_writes_a_missing_or_different_cache(tmp_path):
    def never():
        raise AssertionError("read again")
        yield

    assert len(cached(tmp_path / "cache", MANIFEST, batches())) == 20
    assert len(cached(tmp_path / "cache", MANIFEST, never())) == 20
    other = dataclasses.replace(MANIFEST, dataset="other")
    assert cached(tmp_path / "cache", other, batches()).manifest == other


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_shard_raises(tmp_path, share):
    write_cache(tmp_path / "cache", MANIFEST, batches())
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    contents = shard.read_bytes()
    shard.write_bytes(contents[: int(share * len(contents))])
    with pytest.raises(ValueError, match="expected 20 examples in .*damaged"):
        GridDataset(tmp_path / "cache", MANIFEST)


def test_a_full_disk_keeps_the_previous_cache(tmp_path):
    write_cache(tmp_path / "cache", MANIFEST, batches())

    def full():
        yield from batches(2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_cache(tmp_path / "cache", MANIFEST, full())
    assert len(GridDataset(tmp_path / "cache", MANIFEST)) == 20


def test_a_damaged_grid_raises(tmp_path):
    write_cache(tmp_path / "cache", MANIFEST, batches())
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    content, row = bytearray(shard.read_bytes()), next(batches())[0][0].numpy().astype("uint16")
    content[content.index(row.tobytes())] ^= 1  # one bit
    shard.write_bytes(bytes(content))
    dataset = GridDataset(tmp_path / "cache", MANIFEST)
    dataset.batch([1, 2])
    with pytest.raises(ValueError, match="written to .*damaged"):
        dataset.batch([2, 0])


def test_shards_are_disjoint_and_complete(tmp_path):
    write_cache(tmp_path / "cache", MANIFEST, batches())
    dataset = GridDataset(tmp_path / "cache", MANIFEST)
    shares = [dataset.share(rank, 3) for rank in range(3)]
    assert sum(map(len, shares)) == 20 and len(next(shares[0].batches(100))[0]) == len(shares[0])
    joined = torch.cat([grids for share in shares for grids, _ in share.batches(4)])
    assert torch.equal(joined, dataset.batch(slice(None))[0])
    assert len(dataset.sample(7, seed=0)) == 7 and len(dataset.sample(50, seed=0)) == 20
