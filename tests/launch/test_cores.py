"""What a rank makes of its CPU: no core is asked to do the work of two, and what it cannot do fast is said."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairchem.core.launchers.api import SchedulerConfig, SchedulerType, SlurmConfig

from faenet_ocp.launch import runner


@pytest.mark.parametrize(
    ("cores", "ranks", "workers", "threads"),
    [(8, 1, 0, 8), (8, 1, 3, 5), (2, 1, 4, 1), (8, 2, 0, 4), (8, 2, 3, 1), (2, 2, 0, 1), (2, 4, 0, 1)],
)
def test_ranks_and_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, workers: int, threads: int
) -> None:
    assert _chosen(monkeypatch, SchedulerConfig(ranks_per_node=ranks), cores=cores, workers=workers) == [threads]


@pytest.mark.parametrize(("cores", "asked", "workers", "threads"), [(64, 8, 2, 6), (8, 8, 2, 6), (4, 8, 2, 2)])
def test_a_task_of_a_cluster_keeps_to_what_it_asked_for(
    monkeypatch: pytest.MonkeyPatch, cores: int, asked: int, workers: int, threads: int
) -> None:
    """Whether the cluster binds tasks to cores or not; two ranks a node do not halve what each has asked for."""
    scheduler = SchedulerConfig(mode=SchedulerType.SLURM, ranks_per_node=2, slurm=SlurmConfig(cpus_per_task=asked))
    assert _chosen(monkeypatch, scheduler, cores=cores, workers=workers) == [threads]


def test_a_users_choice_and_a_gpu_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _chosen(monkeypatch, SchedulerConfig(), cpu=False) == []
    assert _chosen(monkeypatch, SchedulerConfig(), variable="6") == []


@pytest.mark.parametrize(
    ("features", "warned"),
    [
        ({"architecture": "x86_64", "avx2": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bfloat16_without_instructions_for_it_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, features: dict[str, Any], warned: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    runner._warn_of_slow_bfloat16()
    assert ("several times as long" in caplog.text) == warned


def _chosen(
    monkeypatch: pytest.MonkeyPatch,
    scheduler: SchedulerConfig,
    *,
    cores: int = 8,
    workers: int = 0,
    cpu: bool = True,
    variable: str | None = None,
) -> list[int]:
    chosen: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    config: Any = SimpleNamespace(job=SimpleNamespace(cpu=cpu), optim=SimpleNamespace(num_workers=workers))
    runner._share_cores(config, scheduler)
    return chosen
