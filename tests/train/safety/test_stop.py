import os
import signal
import threading
from pathlib import Path

import pytest

from cromss_dist.train.safety.stop import STOP_FILE, StopRequest, forget_stop, request_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_wish_to_stop_and_a_second_one_changes_nothing(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(wish) for wish in (signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest(tmp_path) as request:
        assert not request.wanted
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert request.wanted
    assert [signal.getsignal(wish) for wish in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_handlers_are_given_back_after_an_error(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopRequest(tmp_path):
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_file_is_a_wish_in_any_thread(tmp_path: Path) -> None:
    seen: list[bool] = []

    def rank() -> None:  # as Ray Train runs it
        with StopRequest(tmp_path) as request:
            request_stop(tmp_path)
            seen.append(request.wanted)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=rank)
    thread.start()
    thread.join()
    assert seen == [True]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_the_file_is_looked_for_once_a_second_and_a_wish_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("cromss_dist.train.safety.stop.time.monotonic", lambda: now_s)
    with StopRequest(tmp_path) as request:
        assert not request.wanted
        (tmp_path / STOP_FILE).touch()
        now_s += 0.9
        assert not request.wanted
        now_s += 0.2
        assert request.wanted
        forget_stop(tmp_path)
        now_s += 2
        assert request.wanted
    with StopRequest(tmp_path) as request:
        assert not request.wanted
    forget_stop(tmp_path)  # nothing there: no error
