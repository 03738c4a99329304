"""Time and learning rate."""

import itertools
import json
import math

import pytest

from cromss_dist.config import CheckpointConfig, EngineConfig, RunConfig, TrainConfig
from cromss_dist.train.step.schedule import Plateau, Timeline, lr_factor


def timeline(num_train: int = 100, batch: int = 8, **train: float) -> Timeline:
    return Timeline.of(RunConfig(train=TrainConfig(**train), engine=EngineConfig(global_batch=batch)), num_train)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_train", "batch", "epochs"), [(100, 8, 10.0), (103_793, 8192, 200.0), (5, 16, 0.1)])
def test_a_run_is_as_many_samples_as_its_epochs_whatever_the_batch(num_train: int, batch: int, epochs: float) -> None:
    time = timeline(num_train, batch, epochs=epochs)
    assert time.total_steps >= 1
    assert abs(time.total_samples - epochs * num_train) <= max(batch / 2, batch if time.total_steps == 1 else 0)
    assert time.epochs(time.total_samples) * num_train == pytest.approx(time.total_samples)


@pytest.mark.parametrize(
    ("epochs", "every", "expected"),
    [(10.0, 2.0, [25, 50, 75, 100, 125]), (9.92, 3.2, [40, 80, 124]), (10.0, 3.2, [40, 80, 125]), (8.0, 3.2, [40, 80, 100])],
)
def test_the_end_is_validated_once(epochs: float, every: float, expected: list[int]) -> None:
    time = timeline(epochs=epochs, validate_every_epochs=every)
    assert [step for step in range(1, time.total_steps + 1) if time.validates_after(step)] == expected


def test_the_rate_is_a_function_of_samples_and_not_of_the_batch() -> None:
    train = TrainConfig(epochs=10, schedule="cosine", warmup_epochs=1, lr=1.0)
    small, large = (timeline(batch=b, epochs=10.0) for b in (4, 8))
    for samples in range(104, 1000, 8):
        assert lr_factor(train, small, samples) == pytest.approx(lr_factor(train, large, samples), abs=1e-12)


def test_warmup_rises_in_a_line_and_cosine_falls_to_the_floor() -> None:
    train = TrainConfig(epochs=10, schedule="cosine", warmup_epochs=2, lr=0.5, min_lr=0.05)
    time = timeline(epochs=10.0)
    factors = [lr_factor(train, time, samples) for samples in range(0, 1000, 8)]
    assert factors[0] == pytest.approx(8 / 200)
    assert factors[24] == pytest.approx(1.0)
    middle = lr_factor(train, time, 600)
    assert middle == pytest.approx(0.1 + 0.9 * 0.5)  # half way between warm-up and end
    assert lr_factor(train, time, 1000) == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[25:]))


def test_a_cosine_that_decays_before_the_end_stays_at_the_floor() -> None:
    train = TrainConfig(epochs=50, schedule="cosine", lr=5e-4, min_lr=1e-5, decay_epochs=40)
    time = timeline(epochs=50.0)
    shorter = TrainConfig(epochs=40, schedule="cosine", lr=5e-4, min_lr=1e-5)
    for samples in range(0, 4000, 40):
        assert lr_factor(train, time, samples) == lr_factor(shorter, timeline(epochs=40.0), samples)
    assert all(5e-4 * lr_factor(train, time, samples) == pytest.approx(1e-5) for samples in range(4000, 5000, 40))


def test_plateau_cuts_after_more_than_patience_validations_without_a_better_loss() -> None:
    plateau = Plateau(TrainConfig(plateau_patience=2, plateau_factor=0.5, lr=1.0, min_lr=0.2))
    seen = []
    for loss in (3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        plateau.update(loss)
        seen.append(plateau.factor)
    assert seen[:5] == [1, 1, 1, 1, 0.5]
    assert seen[8] == 0.25
    assert seen[-1] == pytest.approx(0.2), "min_lr is the floor"
    assert not math.isnan(plateau.factor)


def test_a_cosine_does_not_heed_the_validation_loss() -> None:
    plateau = Plateau(TrainConfig(schedule="cosine", plateau_patience=0))
    for _ in range(3):
        plateau.update(1.0)
    assert plateau.factor == 1


def test_plateau_schedule_leaves_the_factor_at_one_after_the_warmup() -> None:
    train = TrainConfig(epochs=10, schedule="plateau", warmup_epochs=1)
    assert {lr_factor(train, timeline(epochs=10.0), samples) for samples in range(100, 1000, 8)} == {1.0}


def test_checkpoints_follow_each_interval_of_samples_and_the_end() -> None:
    for batch in (4, 8):
        config = RunConfig(
            train=TrainConfig(epochs=2.5), checkpoint=CheckpointConfig(every_epochs=1), engine=EngineConfig(global_batch=batch)
        )
        time = Timeline.of(config, epoch_samples=80)
        saved = [step * batch for step in range(1, time.total_steps + 1) if time.saves_after(step)]
        assert saved == [80, 160, 200]


@pytest.mark.parametrize("cut", range(13))
def test_a_plateau_goes_on_from_json_as_if_it_had_not_been_cut(cut: int) -> None:
    train = TrainConfig(plateau_patience=1, plateau_factor=0.5, lr=1.0, min_lr=0.2)
    losses = [3.0, 2.0, 2.5, 2.0, 2.0, 1.0, 1.5, 0.9, 0.9, 0.9, 0.9, 0.9]
    whole, first, second = (Plateau(train) for _ in range(3))
    factors = []
    for loss in losses:
        whole.update(loss)
        factors.append(whole.factor)
    for loss in losses[:cut]:
        first.update(loss)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.factor == first.factor
    seen = []
    for loss in losses[cut:]:
        second.update(loss)
        seen.append(second.factor)
    assert seen == factors[cut:]
