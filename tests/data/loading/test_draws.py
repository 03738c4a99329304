"""Hash, draws and split: functions of seed and identity alone."""

import numpy as np
import pytest

from cromss_dist.data.loading.draws import Draws, hash64, split
from cromss_dist.errors import ConfigError


def test_hash_has_its_golden_values() -> None:
    # SplitMix64's own first output for state 0, then ours for more parts. A change here changes every run's order.
    assert hash64(0).tolist() == [0xE220A8397B1DCDAF]
    assert hash64(1, 2).tolist() == [13608149317741381227]
    assert hash64(-1, np.array([-1])).tolist() == [7136257342804621622]


def test_draws_have_their_golden_values() -> None:
    drawn = Draws(0, np.zeros(5, np.int64), np.arange(5))
    assert np.floor(drawn.season * 4).tolist() == [0, 3, 3, 2, 2]
    np.testing.assert_allclose(drawn.row, [0.73803651, 0.37759775, 0.43021699, 0.38732719, 0.54771911], atol=1e-8)


def test_a_draw_depends_on_its_own_sample_alone() -> None:
    together = Draws(4, np.array([0, 0, 1]), np.array([8, 9, 8]))
    alone = Draws(4, np.array([1]), np.array([8]))
    for name in ("season", "row", "col", "flip", "flip_kind", "rotate", "angle"):
        assert getattr(together, name)[2] == getattr(alone, name)[0]
    assert together.row[0] != together.row[2]


def test_draws_are_uniform_and_uncorrelated() -> None:
    drawn = Draws(0, np.zeros(20_000, np.int64), np.arange(20_000))
    floats = np.stack([drawn.row, drawn.col, drawn.flip, drawn.flip_kind, drawn.rotate, drawn.angle])
    assert floats.min() >= 0
    assert floats.max() < 1
    np.testing.assert_allclose(floats.mean(axis=1), 0.5, atol=0.01)
    np.testing.assert_allclose(floats.var(axis=1), 1 / 12, atol=0.003)
    np.testing.assert_allclose(np.corrcoef(floats), np.eye(6), atol=0.03)
    np.testing.assert_allclose(np.bincount((drawn.season * 4).astype(int)) / 20_000, 0.25, atol=0.02)


@pytest.mark.parametrize(("num_keys", "fraction", "num_val"), [(2, 0.01, 1), (100, 0.01, 1), (100, 0.2, 20), (10, 0.5, 5)])
def test_split_holds_out_the_share_and_loses_none(num_keys: int, fraction: float, num_val: int) -> None:
    train, val = split([f"{i:07d}" for i in range(num_keys)], fraction, seed=0)
    assert len(val) == num_val
    assert sorted([*train, *val]) == list(range(num_keys))


def test_split_goes_by_key_not_by_place() -> None:
    keys = [f"{i:07d}" for i in range(40)]
    expected = {keys[i] for i in split(keys, 0.25, seed=3)[1]}
    backwards = keys[::-1]
    assert {backwards[i] for i in split(backwards, 0.25, seed=3)[1]} == expected
    assert {keys[i] for i in split(keys, 0.25, seed=4)[1]} != expected


@pytest.mark.parametrize(("num_keys", "fraction"), [(0, 0.5), (1, 0.01), (4, 0.99)])
def test_split_refuses_to_leave_nothing_for_training(num_keys: int, fraction: float) -> None:
    with pytest.raises(ConfigError, match="leaves none for training"):
        split([str(i) for i in range(num_keys)], fraction, seed=0)
