"""The command: what it writes, what it says in words, what it refuses."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from cromss_dist.cli import main
from cromss_dist.errors import ArchiveMissingError, ConfigError, OutputExistsError, ResultError
from cromss_dist.report.page import Section
from cromss_dist.report.report import compose, file_name
from cromss_dist.report.run_record import Picture, read_run
from cromss_dist.report.tables import NONE, Table, differences, distinct_names, duration, facts
from cromss_dist.report.training import MAX_SHOWN, choose
from cromss_dist.tracking.run.spool import EVENTS_FILE
from cromss_dist.transfer.results import TILES_FILE, read_result, read_tiles, write_result
from tests.report.run_folders import panel, pretraining_run, transfer_run, write_spool


@pytest.fixture(scope="module")
def sections(pretrainings: Path, transfers: Path) -> dict[str, Section]:
    return {section.anchor: section for section in compose([pretrainings, transfers], 2)[1]}


def tables_of(section: Section) -> Iterator[Table]:
    for part in section.parts:
        yield from part.tables


def test_sections_are_those_that_runs_have_something_for(sections: dict[str, Section], pretrainings: Path) -> None:
    of_runs = ["pretraining-runs", "pretraining-curves", "pretraining-classes"]
    assert list(sections) == [*of_runs, "transfer", "scores-by-class", "confusion", "panels", "configuration"]
    assert [section.anchor for section in compose([pretrainings], 2)[1]] == [*of_runs, "panels", "configuration"]


def test_transfers_are_not_drawn_over_pretraining(tmp_path: Path) -> None:
    pretraining_run(tmp_path / "a", num_steps=1)
    transfer = transfer_run(pretraining_run(tmp_path / "b", num_steps=1, task="dw"))
    sections = compose([tmp_path], 1)[1]
    found = {section.anchor: section for section in sections}
    assert len(found) == len(sections)
    for anchor, name in (("pretraining-runs", "a"), ("transfer-runs", transfer.name)):
        assert [row[0] for row in next(tables_of(found[anchor])).rows] == [name]
    assert len({part.drawings[0].key for anchor in found for part in found[anchor].parts if part.drawings}) == sum(
        bool(part.drawings) for anchor in found for part in found[anchor].parts
    )
    assert not [table for table in tables_of(found["configuration"]) if table.caption.startswith("What differs") and table.rows]


def test_scores_are_those_of_the_results(sections: dict[str, Section], transfers: Path) -> None:
    table = next(tables_of(sections["transfer"]))
    runs = [read_result(transfers / f"cromss-{seed}").scores for seed in (0, 1)]
    row = dict(zip(table.header, table.rows[0], strict=True))
    mean = 50 * (runs[0].mean_iou + runs[1].mean_iou)
    std = 100 * abs(runs[0].mean_iou - runs[1].mean_iou) / 2**0.5
    found = re.fullmatch(r"([\d.]+) ± ([\d.]+) \[([\d.]+), ([\d.]+)\]", row["mIoU"])
    assert found is not None
    value, spread, low, high = map(float, found.groups())
    assert (value, spread) == (round(mean, 1), round(std, 1))
    assert low <= value <= high
    assert row["encoder"] == read_result(transfers / "cromss-0").name
    assert row["runs"] == "2"
    assert table.numeric[table.header.index("mIoU")]
    assert not table.numeric[table.header.index("decoder")]


def test_differences_are_within_pairs_and_the_better_encoder_comes_first(sections: dict[str, Section], transfers: Path) -> None:
    (table,) = (table for table in tables_of(sections["transfer"]) if table.caption.startswith("Differences"))
    (row,) = table.rows
    scores = {
        name: [read_result(transfers / f"{name}-{seed}").scores.mean_iou for seed in (0, 1)] for name in ("cromss", "random")
    }
    pairs = [100 * (a - b) for a, b in zip(scores["cromss"], scores["random"], strict=True)]
    assert row[:2] == tuple(read_result(transfers / f"{name}-0").name for name in scores)
    assert row[3:7] == ("2", f"{sum(pairs) / 2:+.1f} ± {abs(pairs[0] - pairs[1]) / 2**0.5:.1f}", "2", "0")


def test_published_figures_stand_beside_ours(sections: dict[str, Section]) -> None:
    (part,) = (part for part in sections["transfer"].parts if part.title == "Beside the paper")
    (table,) = part.tables
    rows = [(row[3], row[4], row[-1]) for row in table.rows]
    assert [origin for origin, *_ in rows] == ["here"] * 2 + ["paper"] * (len(rows) - 2)
    assert ("paper", "CromSS, late fusion", "60.93 ± 0.60") in rows
    assert "arXiv:2405.01217" in table.note


def test_confusions_and_tiles_are_in_order(sections: dict[str, Section]) -> None:
    confusions, tiles = sections["confusion"].parts[0].tables
    shares = [float(row[2]) for row in confusions.rows]
    assert shares == sorted(shares, reverse=True)
    assert all(row[0] != row[1] for row in confusions.rows)
    accuracies = [float(row[1]) for row in tiles.rows]
    assert accuracies == sorted(accuracies)


def test_runs_that_make_no_pair_are_told_and_shown_all_the_same(tmp_path: Path) -> None:
    transfer_run(tmp_path / "a", "one", seed=0)
    transfer_run(tmp_path / "b", "other", seed=1)
    transfer = compose([tmp_path], 0)[1][0]
    (part,) = (part for part in transfer.parts if part.title == "Paired differences")
    assert "no run of one side" in part.text
    alone = compose([tmp_path / "a"], 0)[1][0]
    assert not [part for part in alone.parts if part.title == "Paired differences"]


def test_a_setting_that_cannot_be_compared_takes_the_differences_of_no_other(tmp_path: Path) -> None:
    for name in ("one", "other"):
        transfer_run(tmp_path / name, name)
        transfer_run(tmp_path / f"{name}-tuned", name, mode="finetuned")
    transfer_run(tmp_path / "once-more", "other", mode="finetuned")
    (part,) = (part for part in compose([tmp_path], 0)[1][0].parts if part.title == "Paired differences")
    assert part.text.startswith("None in dw, s2, finetuned, ")
    assert "has 2 runs with label seed" in part.text
    assert len(part.tables[0].rows) == 1


def test_what_a_line_mixes_and_what_differences_leave_out_is_said_below_them(tmp_path: Path) -> None:
    for seed, steps in ((0, 50), (1, 60)):
        run = transfer_run(tmp_path / str(seed), "one", seed=seed)
        write_result(run, replace(read_result(run), steps=steps), read_tiles(read_result(run)))
    transfer_run(tmp_path / "other", "other")
    scores, *others = tables_of(compose([tmp_path], 0)[1][0])
    (found,) = (table for table in others if table.caption.startswith("Differences"))
    assert scores.note.startswith(f"{scores.rows[0][0]} (dw, s2, frozen, ")
    assert scores.note.endswith("runs of 50, 60 steps are taken together; name those of one length alone.")
    assert "without a partner of the same seeds are left out: 1." in found.note


def test_a_run_that_noted_nothing_yet_is_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / EVENTS_FILE).touch()
    runs, configuration = compose([tmp_path], 0)[1]
    assert next(tables_of(runs)).rows[0][:3] == ("new", "no end recorded", "0")
    assert configuration.anchor == "configuration"


def test_figures_that_are_no_numbers_are_drawn_as_gaps_and_told(tmp_path: Path) -> None:
    values = [1.0, math.inf, math.nan, -1e308, 2.0, math.inf]
    figures = [{"event": "progress", "step": i, "samples": i, "metrics": {"train/grad_norm": v}} for i, v in enumerate(values)]
    write_spool(tmp_path, *figures)
    runs, sections = compose([tmp_path], 0)
    assert runs[0].series["train/grad_norm"].values[3] == -math.inf  # larger than any axis takes
    (drawing,) = sections[1].parts[0].drawings
    assert "1 at the start, inf at the end" in drawing.alt
    assert "<svg" in drawing.svg


def test_only_what_differs_is_set_side_by_side(pretrainings: Path) -> None:
    runs = [read_run(pretrainings / f"run-{seed}") for seed in (0, 1)]
    assert differences(runs, ["a", "b"]).rows == (("seed", "0", "1"),)
    rows = {row[0]: row[1:] for row in facts([runs[0], replace(runs[1], error="broke", tags={})], ["a", "b"]).rows}
    assert rows["commit"] == ("b" * 40, NONE)
    assert rows["error"] == (NONE, "broke")
    assert distinct_names(runs) == ["run-0", "run-1"]
    assert distinct_names([runs[0], runs[0]])[0] == f"run-0 ({runs[0].folder})"


def test_more_runs_than_lines_can_be_told_apart_are_said_to_be_left_out(tmp_path: Path) -> None:
    for number in range(MAX_SHOWN + 2):
        pretraining_run(tmp_path / f"run-{number}", num_steps=1)
    sections = {section.anchor: section for section in compose([tmp_path], 1)[1]}
    for anchor in ("pretraining-curves", "panels"):
        assert sections[anchor].parts[0].text == f"Of the first {MAX_SHOWN} of {MAX_SHOWN + 2} runs."
    assert len(next(tables_of(sections["pretraining-runs"])).rows) == MAX_SHOWN + 2


@pytest.mark.parametrize(
    ("number", "most", "chosen"), [(5, 2, [0, 4]), (5, 3, [0, 2, 4]), (5, 1, [4]), (5, 0, []), (2, 9, [0, 1])]
)
def test_panels_are_chosen_evenly_with_the_last_and_the_first(number: int, most: int, chosen: list[int]) -> None:
    pictures = [Picture(Path(str(i)), 1, 1) for i in range(number)]
    assert [int(picture.path.name) for picture in choose(pictures, most)] == chosen


def test_panels_say_after_which_step_they_were_drawn(sections: dict[str, Section]) -> None:
    titles = [[photo.title for photo in part.photos] for part in sections["panels"].parts]
    assert titles == [["After step 0", "After step 20"]] * 2 + [["test"]]


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (111, "1 min 51 s"), (90_000, "1 d 1 h"), (3600, "1 h")])
def test_lengths_of_time_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


def test_the_command_writes_a_page_and_a_picture_for_each_drawing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, figures_of = tmp_path / "run-0", {"train/loss/total": 1.0, "train/kept_s1/water": 0.5}
    write_spool(run, {"event": "progress", "step": 1, "samples": 4, "metrics": figures_of})
    panel(run / "panels" / "step_0000001.png")
    out, figures = tmp_path / "new" / "report.html", tmp_path / "figures"
    command = ["report", str(run), "--out", str(out), "--title", "A & B", "--panels", "1"]
    assert main([*command, "--figures", str(figures)]) == 0
    page = out.read_text()
    assert "<title>A &amp; B</title>" in page
    assert "run-0" in unescape(page)
    assert f"{out}: 1 runs" in capsys.readouterr().out
    pictures = sorted(figures.iterdir())
    assert len(pictures) == page.count('class="canvas"') + page.count("<img ")
    for picture in pictures:
        with Image.open(picture) as image:
            image.verify()
    assert pictures[0].name == "001-pretraining-loss-train-loss-total.png"
    assert main(command) == OutputExistsError.exit_code
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--figures", str(figures)]) == OutputExistsError.exit_code
    assert main([*command, "--overwrite"]) == 0


def test_names_of_files_have_no_way_out_of_their_folder() -> None:
    assert file_name("../../etc/passwd\0 \N{GREEK SMALL LETTER ALPHA}") == "etc-passwd"
    assert len(file_name("a" * 500)) == 80


def test_what_cannot_be_shown_is_refused(tmp_path: Path, transfers: Path) -> None:
    with pytest.raises(ConfigError, match="panels=-1"):
        compose([transfers], -1)
    with pytest.raises(ArchiveMissingError):
        compose([tmp_path], 1)
    run = transfer_run(tmp_path / "damaged")
    (run / TILES_FILE).write_bytes(b"PK")
    with pytest.raises(ResultError, match=r"tiles\.npz"):
        compose([tmp_path], 1)
