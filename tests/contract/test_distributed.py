"""Every method under DDP and FSDP2, on two processes: the ranks stay identical and equal one process's run.

All cases run in one pair of processes, whose start costs more than they do; each test reads what its case left.
"""

from __future__ import annotations

import os
import signal
import socket
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from contract.build import snapshot, state, trained
from contract.test_methods import assert_same
from onestroke.methods import METHODS
from onestroke.training.train import Trainer
from truth.checks import turns_of

LORA = {"lora_rank": {"*": 2}, "lora_targets": ["enter", "body.0", "leave"]}
RUNS = {
    "ddp": {},
    "ddp accumulating": {"accumulate": 2},
    "ddp lora": LORA,
    "fsdp": {"shard": True},
    "fsdp accumulating": {"shard": True, "accumulate": 2},
    "fsdp lora": {"shard": True, **LORA},
}
CASES = [(name, run) for name in METHODS for run in RUNS]
STOPS = ("ddp", "fsdp lora")  # the runs that stop and resume: what else they are does not touch a checkpoint
SIZE = 8  # of a micro-batch of one process

pytestmark = pytest.mark.timeout(1500)  # all cases are played before the first test


def play_case(name: str, run: str, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Two rounds; in STOPS four without a stop, and also two, a save and two more by new objects."""
    changes = {"batch_size": SIZE, **RUNS[run]}
    straight = trained(name, rounds=rounds_of(run), **changes)
    look(straight)
    found = {"straight": snapshot(straight)}
    if run in STOPS:
        trained(name, folder, rounds=2, **changes)
        found["resumed"] = snapshot(trained(name, folder, resume=True, **changes))
    share = {p: local_share(getattr(straight.method, p)) for p in straight.method.players}
    return {**found, "student": state(straight.finish()), "rows": straight.batches(0)[0].noise, "share": share}


def rounds_of(run: str) -> int:
    return 4 if run in STOPS else 2


def look(trainer: Trainer) -> None:
    """Call every player without gradient: a sharded one must not stay whole, nor must its parameters change."""
    with torch.no_grad():
        list(turns_of(trainer.method, trainer.batches(9)[0], 9))


def local_share(module: torch.nn.Module) -> float:
    """The part of the trained numbers that this process holds."""
    live = [p for p in module.parameters() if p.requires_grad]
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in live)
    return local / sum(p.numel() for p in live)


def worker(rank: int, port: int, folder: Path, cases: list[tuple[str, str]], first: int) -> None:
    """One of two processes: plays every case from number `first` and leaves what it found, or its traceback."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for number, (name, run) in list(enumerate(cases))[first:]:
        file = folder / f"{number}.{rank}.pt"
        try:
            torch.save(play_case(name, run, folder / f"{first}-{number}"), file)
        except Exception:
            torch.save(traceback.format_exc(), file)
        torch.distributed.barrier()  # fails on the other rank, and ends both, where one left a case half-way
    torch.distributed.destroy_process_group()


def play_all(folder: Path, cases: list[tuple[str, str]]) -> str:
    """Play the cases in a pair of processes. Returns why not all were played, if so.

    Where SEGV or ABRT ended a process, a new pair goes on, twice at most: in some runs of the whole suite a thread of
    gloo's (pt_gloo_runloop, torch 2.13) dies in malloc. Why is not known; valgrind found no wrong access in four cases.
    """
    first, said = 0, ""
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pair = torch.multiprocessing.spawn(worker, (port, folder, cases, first), nprocs=2, join=False)
        try:
            while not pair.join(timeout=5):
                pass
            return ""
        except Exception as error:
            said = str(error)
        if not any(process.exitcode in (-signal.SIGSEGV, -signal.SIGABRT) for process in pair.processes):
            break
        done = min(len(list(folder.glob(f"*.{rank}.pt"))) for rank in (0, 1))
        first = max(done - 1, 0)  # the other process may have left an error as its last
    return said


@pytest.fixture(scope="module")
def found(tmp_path_factory, request):
    """(case, rank) -> what the worker left, of the cases that are tested in this session."""
    folder = tmp_path_factory.mktemp("ranks")
    asked = [i.callspec.params for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    cases = [case for case in CASES if dict(zip(("name", "run"), case, strict=True)) in asked]
    said = play_all(folder, cases)

    def read(case: tuple[str, str], rank: int):
        file = folder / f"{cases.index(case)}.{rank}.pt"
        assert file.exists(), f"rank {rank} did not finish {case}: {said}"
        left = torch.load(file)
        assert isinstance(left, dict), left
        return left

    return read


@pytest.mark.parametrize(("name", "run"), CASES)
def test_two_processes_are_one(name, run, found):
    """float64: the ranks agree to the bit; one process with the whole batch agrees to rounding in another order."""
    one, two = found((name, run), 0), found((name, run), 1)
    assert_same(one["straight"], two["straight"])
    assert_same(one["student"], two["student"])
    assert not torch.equal(one["rows"], two["rows"])
    for player, share in one["share"].items():
        assert share + two["share"][player] == (1 if "fsdp" in run else 2)
        assert share == 1 or 0.3 < share < 0.7
    changes = {k: v for k, v in RUNS[run].items() if k != "shard"}
    accumulate = changes.pop("accumulate", 1)
    alone = trained(name, rounds=rounds_of(run), batch_size=2 * accumulate * SIZE, **changes)
    assert_same(one["straight"], snapshot(alone), 1e-10)
    assert_same(one["student"], state(alone.finish()), 1e-10)


@pytest.mark.parametrize(("name", "run"), [case for case in CASES if case[1] in STOPS])
def test_resuming_two_processes_is_bit_equal(name, run, found):
    for rank in (0, 1):
        left = found((name, run), rank)
        assert_same(left["resumed"], left["straight"])
