import torch
from torch import Tensor

from cromss_dist.losses import Counts, CromssLoss, LossConfig

Batch = dict[str, Tensor]
PROGRESS = 60.0
WEIGHTS = torch.tensor([1.0, 0.0, 1.0, 1.0])


def counted(batch: Batch, select: bool = True) -> tuple[Counts, Tensor]:
    """Counts of the batch, its second sample left out, and both selections."""
    output = CromssLoss(LossConfig(select=select))(**batch, progress=PROGRESS, sample_weights=WEIGHTS)
    return output.counts, torch.stack((output.selection_s1, output.selection_s2))


def test_each_class_has_the_weights_and_pixels_of_its_label(batch: Batch) -> None:
    counts, selection = counted(batch)
    assert counts.sums.dtype == torch.float64
    assert counts.weight.shape == counts.kept.shape == (2, 9)
    for value in range(9):
        mask = (batch["label"] == value) & (WEIGHTS > 0)[:, None, None]
        assert counts.labelled[value] == mask.sum()
        for m in range(2):
            torch.testing.assert_close(counts.weight[m, value], selection[m][mask].double().sum(), rtol=1e-7, atol=0)
            assert counts.kept[m, value] == (selection[m][mask] == 1).sum()
    assert counts.labelled[7] == counts.kept[:, 7].sum() == counts.weight[:, 7].sum() == 0
    assert 0 < counts.kept.sum() < 2 * counts.labelled.sum()


def test_branches_agree_where_their_largest_logits_are_of_one_class(batch: Batch) -> None:
    counts, _ = counted(batch)
    same = batch["logits_s1"].argmax(1) == batch["logits_s2"].argmax(1)
    assert counts.agreed == same[WEIGHTS > 0].sum()
    assert counts.valid == 3 * same[0].numel()


def test_equal_branches_agree_everywhere_also_where_no_class_is_ahead(batch: Batch) -> None:
    for logits in (batch["logits_s1"], torch.zeros_like(batch["logits_s1"]), batch["logits_s1"] * 1e4):
        counts, _ = counted(batch | {"logits_s1": logits, "logits_s2": logits})
        assert counts.agreed == counts.valid


def test_all_is_kept_where_nothing_is_selected(batch: Batch) -> None:
    counts, _ = counted(batch, select=False)
    for per_modality in (counts.weight, counts.kept):
        assert torch.equal(per_modality, counts.labelled.expand(2, -1))


def test_counts_of_two_halves_add_up_where_the_weights_are_those_of_the_whole(batch: Batch) -> None:
    loss = CromssLoss(LossConfig(select=False))
    halves = [loss(**{key: value[rows] for key, value in batch.items()}, progress=0) for rows in (slice(0, 1), slice(1, 4))]
    whole = loss(**batch, progress=0)
    assert torch.equal((halves[0].counts + halves[1].counts).sums, whole.counts.sums)
