from typing import Any

import numpy as np
import pytest

from cromss_dist.data.store.collection import Collection
from cromss_dist.data.store.dataset import Dataset
from cromss_dist.errors import ConfigError
from cromss_dist.schema import CLASS_NAMES, IMAGE_ARRAYS, NORMALISATION, Normalisation
from tests.data.fake_dataset import FakeDataset

PARTS = (FakeDataset((3, 0, 2), seed=1), FakeDataset((4,), seed=2), FakeDataset((1, 1), seed=3))


def test_each_sample_of_a_collection_is_that_of_its_dataset() -> None:
    collection: Dataset = Collection(PARTS)
    found = {name: np.empty(collection.shape(name), np.uint8) for name in collection.arrays}
    own = [(part, i) for part in PARTS for i in range(sum(part.sizes))]
    assert collection.locations == tuple(part.locations[i] for part, i in own)
    for sample_id, (part, i) in enumerate(own):
        collection.read_into(sample_id, sample_id % 4, found)
        for name, array in found.items():
            np.testing.assert_array_equal(array, part.pixels(i, sample_id % 4, name))
        for name in ("lon", "lat", "s1_time", "s2_time"):
            np.testing.assert_array_equal(getattr(collection.places, name)[sample_id], getattr(part.places, name)[i])


def test_shards_are_counted_on_from_dataset_to_dataset() -> None:
    parts = tuple(FakeDataset(part.sizes) for part in PARTS)
    collection = Collection(parts)
    assert collection.shard_sizes.tolist() == [3, 0, 2, 4, 1, 1]
    assert collection.starts.tolist() == [0, 5, 9]
    for shard in range(6):
        collection.fetch(shard)
    assert [part.fetched for part in parts] == [[0, 1, 2], [0], [0, 1]]


def test_a_collection_is_local_where_all_of_it_is() -> None:
    local, remote = FakeDataset((1,), is_local=True), FakeDataset((1,), is_local=False)
    assert [Collection(parts).is_local for parts in ((local, local), (local, remote), (remote,))] == [True, False, False]


def test_the_digest_depends_on_every_dataset_and_their_order() -> None:
    digests = {Collection(parts).digest for parts in (PARTS, PARTS[:2], PARTS[::-1], PARTS[1:])}
    assert len(digests) == 4


def test_only_arrays_that_all_have_are_offered() -> None:
    assert "reference" in Collection(PARTS).arrays
    real = FakeDataset((2,), with_reference=False)
    assert "reference" not in Collection((PARTS[0], real)).arrays
    assert Collection((PARTS[0], real)).arrays == Collection((real, PARTS[0])).arrays


OTHER_S1 = Normalisation("s1", "dB", ("VV", "VH"), (-12.0, -20.0), (5.0, 6.0))


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"patch_px": 18}, r"patch sizes \(px\) differ, 12 and 18"),
        ({"num_seasons": 3}, "numbers of seasons differ, 4 and 3"),
        ({"images": IMAGE_ARRAYS[:3]}, "image arrays differ.*B10"),
        ({"class_names": CLASS_NAMES[:8]}, "classes differ.*snow"),
        ({"contracts": {**NORMALISATION, "s1": OTHER_S1}}, f"normalisations .digests. differ.*{OTHER_S1.digest[:12]}"),
    ],
)
def test_datasets_that_cannot_share_a_batch_are_refused_by_what_differs(difference: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"Datasets 0 and 2 of the mixture.*{message}"):
        Collection((*PARTS[:2], FakeDataset((2,), **difference)))


def test_a_collection_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no dataset"):
        Collection(())
