from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from ich_train.meters import Meter, Reporter
from ich_train.runs import Epoch

FIRST = Epoch(1, 12.0, 0.5, 0.80, 0.45, 0.82, 1e-3, 1234.0, 0.015)
LINES = [FIRST] + [Epoch(k, 12.0, 0.5 - k / 10, 0.80 + k / 50, 0.46, 0.82 - k / 50, 1e-3, 1234.0, 0.0) for k in (2, 3)]


def reporter(*, terminal: bool, silent: bool = False) -> tuple[Reporter, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, color_system=None)
    return Reporter(console, epochs=3, silent=silent), text


def meter() -> Meter:
    return Meter(torch.tensor([30.0, 60.0, 45.0, 60.0], dtype=torch.float64), slices=100, seconds=2.0, wait_s=0.1)


def test_a_terminal_shows_a_bar_with_rate_loss_and_waiting() -> None:
    shown, text = reporter(terminal=True)
    with shown:
        shown.step(2, 5, 10, meter())
    printed = text.getvalue()
    for part in ("epoch 2/3", "5/10", "50 slices/s", "loss 0.5000", "5% waiting"):
        assert part in printed


def test_elsewhere_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ich_train.meters.LINE_S", 0.0)
    shown, text = reporter(terminal=False)
    with shown:
        shown.step(2, 1500, 2000, meter())
    assert text.getvalue() == "epoch 2/3: 1,500 of 2,000 steps  50 slices/s  loss 0.5000  5% waiting\n"


def test_elsewhere_there_is_a_line_for_each_epoch() -> None:
    shown, text = reporter(terminal=False)
    with shown:
        shown.step(1, 5, 10, meter())
        shown.epoch(FIRST, best=True)
    assert text.getvalue() == (
        "epoch 1/3: training loss 0.5000, accuracy 0.8000; validation loss 0.4500 (lowest so far), accuracy 0.8200; "
        "1,234 slices/s, 1.5% waiting for data, 12.0 s\n"
    )


def test_the_summary_marks_the_best_epoch_and_dates_overfitting() -> None:
    shown, text = reporter(terminal=False)
    shown.summary(LINES)
    printed = text.getvalue()
    assert "1 *" in printed
    assert "1.5%" in printed
    assert "Overfitting since epoch 2" in printed
    *table, _, _ = printed.splitlines()
    assert max(map(len, table)) <= 80
    assert all(line == line.rstrip() for line in table)


def test_other_ranks_say_nothing() -> None:
    shown, text = reporter(terminal=True, silent=True)
    with shown:
        shown.step(1, 10, 10, meter())
        shown.epoch(FIRST, best=True)
        shown.summary(LINES)
    assert text.getvalue() == ""
