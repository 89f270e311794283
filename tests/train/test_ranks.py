from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ich_prep.errors import UsageError
from ich_train.ranks import Ranks, Stop, choose_device, join_ranks

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def test_one_process_is_the_first_and_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks("cpu") as ranks:
        assert ranks == ALONE
        assert ranks.first
        sums = torch.tensor([1.0, 2.0])
        total = ranks.total(sums)
        total += 1
        assert sums.tolist() == [1, 2]
        ranks.wait()


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("quantum", "cuda:99"):
        with pytest.raises(UsageError, match=wrong):
            choose_device(wrong)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_ask_to_stop_and_the_third_is_the_old_one(number: signal.Signals) -> None:
    received = []
    before = signal.signal(number, lambda *_: received.append(1))
    try:
        with Stop(ALONE) as stop:
            assert not stop.agreed_at(10)
            for _ in range(2):
                os.kill(os.getpid(), number)
                assert stop.agreed()
                assert stop.agreed_at(3)
            assert not received
            os.kill(os.getpid(), number)
            assert received
        os.kill(os.getpid(), number)
        assert len(received) == 2
    finally:
        signal.signal(number, before)


def test_another_thread_may_train() -> None:
    agreed: list[bool] = []

    def work() -> None:
        with Stop(ALONE) as stop:
            agreed.append(stop.agreed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert agreed == [False]


LEAVING = """
import os, sys, torch
from torch.nn.parallel import DistributedDataParallel
from ich_train.ranks import join_ranks

def one_step():
    network = DistributedDataParallel(torch.nn.Linear(3, 3))
    network(torch.ones(2, 3)).sum().backward()

with join_ranks("cpu"):
    one_step()
tasks = os.listdir("/proc/self/task")
print(sorted(open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to list threads")
def test_no_thread_of_the_group_outlives_it() -> None:
    """One that drops a tensor while Python exits would abort the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVING],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in processes:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "gloo" not in printed and "python" in printed
