"""The STAC item: valid by STAC 1.1 and by MLM 1.4.0, readable by pystac, and exact about the scaling."""

import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pystac
import pytest
import referencing
from pystac.extensions import mlm
from pystac.validation.local_validator import get_local_schema_cache

from cromss_dist.encoders.publish.stac import file_asset, scaling_expression, stac_item
from cromss_dist.schema import BANDS, NORMALISATION, Modality
from tests.conftest import MakeCard
from tests.encoders.publish import mlm_schema

ASSETS = {
    "model": file_asset("a", 3, "ab" * 32, "application/octet-stream", ["mlm:model"], "Weights", "torch.save"),
    "card": file_asset("b", 2, "cd" * 32, "application/json", ["metadata"], "Card"),
}


def problems(item: dict[str, Any]) -> list[str]:
    """What STAC 1.1's own schema, which pystac carries, and MLM's have against an item."""
    schemas = get_local_schema_cache()
    registry = referencing.Registry().with_resources(
        [(uri, referencing.Resource.from_contents(schema)) for uri, schema in schemas.items()]
    )
    core = next(schema for uri, schema in schemas.items() if uri.endswith("/item.json"))
    validators = (jsonschema.Draft7Validator(core, registry=registry), jsonschema.Draft7Validator(mlm_schema.SCHEMA))
    return [f"{list(error.path)}: {error.message}" for validator in validators for error in validator.iter_errors(item)]


@pytest.mark.parametrize("modality", ["s1", "s2"])
def test_an_item_is_valid(make_card: MakeCard, modality: Modality) -> None:
    item = json.loads(json.dumps(stac_item(make_card(modality=modality), 5, ASSETS)))
    assert problems(item) == []


def test_an_item_of_an_import_that_knows_little_is_valid_and_leaves_out_what_is_not_known(make_card: MakeCard) -> None:
    origin = {"file": "x.ckpt", "sha256": "0" * 64, "url": "", "layout": "moco"}
    unknown = {"dataset": "", "patch_px": 0, "config_digest": "", "manifest_digest": "", "run_id": "", "licence": ""}
    card = replace(make_card(), origin=origin, recipe={}, versions={}, **unknown)  # type: ignore[arg-type]
    item = stac_item(card, 5, ASSETS)
    assert problems(item) == []
    assert item["properties"]["license"] == "other"
    left_out = {"mlm:hyperparameters", "mlm:framework_version", "mlm:pretrained_source"}
    assert not left_out & item["properties"].keys()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda item: item["properties"].pop("mlm:input"),
        lambda item: item["properties"].update({"mlm:colour": "red"}),
        lambda item: item["properties"]["mlm:input"][0]["value_scaling"].append({"type": "min-max", "minimum": 0}),
        lambda item: item["properties"]["mlm:input"][0].update(resize_type="stretch"),
        lambda item: item["assets"]["model"].pop("mlm:artifact_type"),
        lambda item: item["assets"]["card"].update({"mlm:artifact_type": "json"}),
        lambda item: item["assets"].pop("model"),
        lambda item: item["properties"].pop("end_datetime"),
        lambda item: item.pop("geometry"),
    ],
)
def test_the_schemas_find_what_is_wrong(make_card: MakeCard, spoil: Any) -> None:
    item = json.loads(json.dumps(stac_item(make_card(), 5, ASSETS)))
    spoil(item)
    assert problems(item)


def test_pystac_reads_an_item_as_a_model(make_card: MakeCard) -> None:
    card = make_card()
    item = pystac.Item.from_dict(stac_item(card, 5, ASSETS))
    assert mlm.SCHEMA_URI_PATTERN.format(version=mlm.DEFAULT_VERSION) == mlm_schema.URI
    model = mlm.MLMExtension.ext(item)
    assert model.architecture == "resnet18"
    assert model.total_parameters == 5
    assert tuple(model.input[0].bands) == card.bands
    assert model.input[0].input.shape == [-1, 13, -1, -1]
    assert [output.result.shape[1] for output in model.output] == list(card.out_channels)
    assert model.hyperparameters is not None
    assert model.hyperparameters.to_dict() == card.recipe


@pytest.mark.parametrize("modality", ["s1", "s2"])
def test_the_expression_of_a_band_scales_as_the_contract_does(modality: Modality) -> None:
    contract = NORMALISATION[modality]
    for band in BANDS[modality]:
        part = contract.select([band])
        (mean,), (std,) = part.mean, part.std
        # The middle of each step: there, float32 and float64 truncate alike. Then below, above and between pixels.
        inside = mean - 2 * std + (np.arange(255) + 0.5) / 255 * 4 * std
        values = np.concatenate([inside, [mean - 9 * std, mean + 9 * std, np.nan]])
        functions = {name: getattr(np, name) for name in ("trunc", "nan_to_num", "clip")}
        scaled = eval(scaling_expression(contract, band), {"__builtins__": {}, "A": values} | functions)
        assert np.array_equal(scaled * 255, [*range(255), 0, 255, 0])
        assert np.array_equal(scaled * 255, part.to_uint8(values[None, None], [band])[0, 0])


def test_the_same_card_gives_the_same_item_and_another_card_another_id(make_card: MakeCard) -> None:
    assert stac_item(make_card(), 5, ASSETS) == stac_item(make_card(), 5, ASSETS)
    assert stac_item(make_card(), 5, ASSETS)["id"] != stac_item(make_card(run_id="1" * 32), 5, ASSETS)["id"]
