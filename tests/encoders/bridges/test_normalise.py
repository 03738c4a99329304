import numpy as np
import pytest
import torch

from cromss_dist.encoders.bridges.normalise import Normalise
from cromss_dist.errors import BandError
from cromss_dist.schema import NORMALISATION, S2_BANDS, S2_NORMALISATION, Modality


@pytest.mark.parametrize(("modality", "low", "high"), [("s1", -40.0, 10.0), ("s2", -500.0, 12_000.0)])
def test_it_gives_to_the_bit_what_the_contract_gives(modality: Modality, low: float, high: float) -> None:
    contract = NORMALISATION[modality]
    values = np.random.default_rng(0).uniform(low, high, (2, len(contract.bands), 64, 64)).astype(np.float32)
    values[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    # The edges of every level, one float to either side.
    mean, std = contract.mean[0], contract.std[0]
    edges = (mean - 2 * std + 4 * std * np.arange(256) / 255).astype(np.float32)
    values[1, 0, 0], values[1, 0, 1], values[1, 0, 2] = (
        edges[:64],
        np.nextafter(edges[:64], -1e9),
        np.nextafter(edges[64:128], 1e9),
    )
    expected = torch.from_numpy(contract.to_uint8(values, contract.bands)).float() / 255
    assert torch.equal(Normalise(contract)(torch.from_numpy(values)), expected)


def test_it_takes_digital_numbers_and_any_dimensions_in_front() -> None:
    numbers = np.random.default_rng(0).integers(0, 10_000, (2, 3, 13, 4, 4)).astype(np.uint16)
    expected = torch.from_numpy(S2_NORMALISATION.to_uint8(numbers, S2_BANDS)).float() / 255
    got = Normalise(S2_NORMALISATION)(torch.from_numpy(numbers))
    assert torch.equal(got, expected)
    assert torch.equal(Normalise(S2_NORMALISATION)(torch.from_numpy(numbers[0, 0])), expected[0, 0])


def test_its_bands_are_those_of_the_contract_in_its_order() -> None:
    part = S2_NORMALISATION.select(("B8", "B2"))
    values = torch.full((2, 1, 1), 2000.0)
    whole = Normalise(S2_NORMALISATION)(torch.full((13, 1, 1), 2000.0))
    assert torch.equal(Normalise(part)(values), whole[[S2_BANDS.index("B8"), S2_BANDS.index("B2")]])
    with pytest.raises(BandError, match=r"shape \(13, 4, 4\) do not fit; give \(\.\.\., 2, H, W\) with the bands B8, B2"):
        Normalise(part)(torch.zeros(13, 4, 4))


def test_it_adds_nothing_to_a_state_dict_and_moves_with_its_model() -> None:
    module = Normalise(S2_NORMALISATION)
    assert not module.state_dict()
    assert {name for name, _ in module.named_buffers()} == {"low", "span"}
    assert "B8A" in repr(module)
