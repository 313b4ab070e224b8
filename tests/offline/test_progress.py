"""Progress says how long a stage still takes, from its first step on."""

import pytest

from offline.progress import Pace, console_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose last entry is the time."""
    times = [0.0]
    monkeypatch.setattr("offline.progress.time.monotonic", lambda: times[-1])
    return times


def test_time_left_is_known_after_the_first_layer(clock: list[float]) -> None:
    pace = Pace()
    assert pace.seconds_left("layers", 0, 32) is None
    clock.append(100.0)
    assert pace.seconds_left("layers", 1, 32) == 31 * 100
    clock.append(160.0)
    assert pace.seconds_left("layers", 2, 32) == 30 * 80


def test_stage_whose_first_report_is_a_finished_step_counts_from_the_stage_before(clock: list[float]) -> None:
    pace = Pace()
    pace.seconds_left("rotation", 60, 60)
    clock.append(7.0)
    assert pace.seconds_left("targets", 1, 3) == 14


def test_layers_of_an_earlier_run_do_not_count_in_the_pace(clock: list[float]) -> None:
    pace = Pace()
    for done in (1, 2, 2):
        pace.seconds_left("layers", done, 4)
    clock.append(50.0)
    assert pace.seconds_left("layers", 3, 4) == 50


def test_lines_on_standard_error_give_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as progress:
        progress("layers", 0, 3)
        clock.append(90.0)
        progress("layers", 1, 3, "output error 0.01")
    assert capsys.readouterr().err.splitlines() == ["layers 0/3", "layers 1/3, 0:03:00 left, output error 0.01"]
