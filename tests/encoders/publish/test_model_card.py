"""The model card: front matter that the hub's own library reads, what is known, and what is said not to be."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from cromss_dist.encoders.publish.model_card import model_card
from cromss_dist.tracking.package.card import EncoderCard
from cromss_dist.tracking.package.evidence import Evidence
from tests.conftest import MakeCard

FIGURES = (
    Evidence("dw", "miou", "frozen", 0.6, 0.58, 0.62, source="run-1", runs=3),
    Evidence("dw", "oa", "finetuned", 0.8, 0.79, 0.81, source="run-2"),
)


def text_of(card: EncoderCard, evidence: tuple[Evidence, ...] = (), hub_id: str = "") -> str:
    return model_card(card, evidence, {"package/card.json": "a" * 64}, "weights-01234567.pth", hub_id)


def front_of(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(content, dict)
    return content


def imported(card: EncoderCard, **facts: Any) -> EncoderCard:
    origin = {"file": "x.ckpt", "sha256": "0" * 64, "url": "", "layout": "moco"}
    known: dict[str, Any] = {"origin": origin, "fusion": "none", "classes": (), "recipe": {}}
    unknown = {"dataset": "", "patch_px": 0, "config_digest": "", "manifest_digest": "", "run_id": "", "licence": ""}
    return replace(card, **known | unknown | facts)


def test_the_hub_s_library_reads_the_evidence_out_of_the_front_matter(make_card: MakeCard) -> None:
    data: Any = ModelCard(text_of(make_card(), FIGURES, "my-group/my-encoder")).data
    assert data.model_name == "my-encoder"
    assert [(r.task_type, r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("image-segmentation", "dw", "mean_iou", 0.6),
        ("image-feature-extraction", "dw", "accuracy", 0.8),
    ]
    assert data.license == "apache-2.0"
    assert data.library_name == "cromss-dist"
    assert {"sentinel2", "resnet18", "cromss"} <= set(data.tags)


def test_without_evidence_no_figure_is_claimed(make_card: MakeCard) -> None:
    text = text_of(make_card())
    assert not {"metrics", "model-index"} & front_of(text).keys()
    assert "has not been measured" in text


@pytest.mark.parametrize(
    ("licence", "front"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("GPL-3.0-only", {"license": "other", "license_name": "gpl-3.0-only"}),
        ("", {"license": "unknown"}),
    ],
)
def test_the_licence_is_the_hub_s_or_named_or_unknown(make_card: MakeCard, licence: str, front: dict[str, str]) -> None:
    content = front_of(text_of(imported(make_card(), licence=licence)))
    assert {key: content[key] for key in content if key.startswith("license")} == front


def test_a_dataset_is_linked_only_where_its_name_is_one_of_the_hub(make_card: MakeCard) -> None:
    assert "datasets" not in front_of(text_of(make_card()))
    linked = front_of(text_of(replace(make_card(), dataset="my-group/SSL4EO-S12")))
    assert linked["datasets"] == ["my-group/SSL4EO-S12"]


def test_the_card_says_what_goes_in_and_what_comes_out(make_card: MakeCard) -> None:
    text = text_of(make_card())
    assert "multiples of 8 px. It was trained on patches of 256 x 256 px" in text
    assert "| B2 | 492.7 | 1390.781577 | 850.3481844 |" in text
    assert "u8 = trunc(clip((v - (mean - 2 std)) / (4 std) * 255, 0, 255))" in text
    assert "| 3 | 128 | 8 |" in text


def test_what_an_import_does_not_know_is_said_once_as_a_limit_and_where_it_would_stand(make_card: MakeCard) -> None:
    text = text_of(imported(make_card()))
    missing = "training data, licence, size of the training patches, training config, sha256"
    assert f"- Not known: {missing}" in text
    assert "| training data | not known |" in text
    assert "| imported: url | not known |" in text
    assert "trained on patches" not in text
    assert "Not known" not in text_of(make_card())


def test_values_of_an_imported_card_stay_text(make_card: MakeCard) -> None:
    evil = "<script>x</script> | `a` [b](c)\n\n# heading\n---"
    text = text_of(imported(make_card(), dataset=evil, licence=evil, versions={evil: evil}))
    front = front_of(text)
    assert (front["license"], front["license_name"]) == ("other", evil.lower())
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body
    assert "\n# heading" not in body
    assert r"\`a\` \[b\](c)" in body


def test_units_of_an_imported_card_cannot_end_a_block_of_code(make_card: MakeCard) -> None:
    card = make_card()
    units = "x\nraise SystemExit\n```\n<b>"
    text = text_of(imported(card, normalisation=replace(card.normalisation, units=units)))
    assert "\nraise SystemExit" not in text
    assert text.count("```") == 6


def test_the_hub_s_name_stands_in_the_title_and_in_the_code(make_card: MakeCard) -> None:
    text = text_of(make_card(), hub_id="my-group/my-encoder")
    assert "\n# my-encoder\n" in text
    assert 'huggingface_hub.snapshot_download("my-group/my-encoder")' in text
    assert "snapshot_download" not in text_of(make_card())
