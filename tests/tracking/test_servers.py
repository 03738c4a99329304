from pathlib import Path

import pytest

from tests.tracking.life import live


def test_encoders_are_sent_found_promoted_fetched_and_rolled_back_on_sqlite(
    store_uri: str, trained_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(store_uri, trained_runs, tmp_path / "life", monkeypatch)
