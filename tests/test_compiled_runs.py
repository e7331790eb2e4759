"""Runs with torch.compile: the numbers and files of runs without, few compilations, and an end in any case."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import processes
from faenet_ocp import compilation, trainer, training
from faenet_ocp.checkpoint import load_checkpoint
from faenet_ocp.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own tracing
SPLIT = "v"
GRADIENT = [{"energy": {}}, {"forces": {"fn": "l2mae"}}, {"gradient": {"fn": "l2mae", "start_epoch": 1}}]


class Counter:
    """Counts compilations; the graphs and their gradients run in eager mode."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


def _no_backward(graph, example_inputs):
    raise RuntimeError("gradients cannot be compiled here")


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def counter(monkeypatch) -> Counter:
    counter = Counter()
    _use_backend(counter, monkeypatch)
    return counter


def _use_backend(backend: Callable[..., Any], monkeypatch) -> None:
    for module in (training, trainer):
        monkeypatch.setattr(module, "compile_model", partial(compilation.compile_model, backend=backend))


def _config(folder: Path, data: Path, *, task: str = "is2re", **sections: Any) -> list[str]:
    """Batches of 4 systems of 5 to 18 atoms in training, of 4 and 1 in evaluation; EMA."""
    optim = {"lr_initial": 0.002, "batch_size": 5, "eval_batch_size": 4, "max_epochs": 3, "num_workers": 0}
    config = processes.write_config(
        folder / "config.yml", data, task=task, optim=optim | {"ema_decay": 0.9}, **sections
    )
    return ["--config", str(config), "--identifier"]


def _losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in processes.records(folder) if "train/loss" in record]


def _assert_same_result(eager: Path, compiled: Path, tolerance: float = 1e-5) -> None:
    assert _losses(compiled) == pytest.approx(_losses(eager), rel=1e-3)
    assert len(_losses(eager)) > 5
    one, two = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (eager, compiled))
    for part in ("model", "ema"):
        assert list(one[part]) == list(two[part])
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-3, atol=tolerance)


# The gradient term goes backwards twice through the blocks, and the energy's gradient is evaluated too.
SETTINGS = [
    ("is2re", {}),
    (
        "s2ef",
        {
            "loss_functions": GRADIENT,
            "outputs": {"forces": {"eval_from": "energy_gradient"}},
            "model": {"force_norm": None},  # biases before a norm have no gradient but rounding
        },
    ),
]


@pytest.mark.parametrize(("task", "sections"), SETTINGS, ids=["is2re", "s2ef"])
def test_training_compiles_a_few_times_and_ends_where_it_would_without(
    task: str, sections: dict[str, Any], data: Path, tmp_path: Path, counter: Counter, caplog
) -> None:
    arguments = _config(tmp_path, data, task=task, **sections)
    assert main([*arguments, "eager"]) == 0
    assert counter.count == 0
    assert main([*arguments, "compiled", "--compile"]) == 0

    assert 2 <= counter.count <= 8  # three pieces for each of training and evaluation, and for batches of one system
    assert "compile: failed" not in caplog.text
    _assert_same_result(tmp_path / "eager", tmp_path / "compiled")


def test_a_run_goes_on_with_and_without(data: Path, tmp_path: Path, counter: Counter, caplog) -> None:
    arguments = _config(tmp_path, data)
    compiled = ["--compile"]
    runs: dict[str, tuple[list[str], list[str]]] = {"eager": ([], []), "to": ([], compiled), "from": (compiled, [])}
    for run, (first, second) in runs.items():
        assert main([*arguments, run, "--optim.max_epochs=1", *first]) == 0
        assert (counter.count > 0) == (run == "from")
        assert main([*arguments, run, *second]) == 0
        assert (counter.count > 0) == (run != "eager")
        counter.count = 0
        torch._dynamo.reset()
        _assert_same_result(tmp_path / "eager", tmp_path / run)
    assert caplog.text.count("job.compile: the run began with") == 2


def test_validating_and_predicting(data: Path, tmp_path: Path, counter: Counter) -> None:
    arguments = _config(tmp_path, data)
    assert main([*arguments, "run"]) == 0
    checkpoint = ["--checkpoint", str(tmp_path / "run" / "checkpoints" / "best.pt"), "--run-dir", str(tmp_path)]
    for mode in ("validate", "predict"):
        assert main(["--mode", mode, *checkpoint, "--identifier", f"{mode}-eager"]) == 0
        before = counter.count
        assert main(["--mode", mode, *checkpoint, "--identifier", mode, "--compile"]) == 0
        assert mode == "predict" or 1 <= counter.count - before <= 6  # predicting may use what validating compiled
    predictions = [np.load(tmp_path / f"predict{end}/results/predictions/{SPLIT}.npz") for end in ("", "-eager")]
    np.testing.assert_allclose(predictions[0]["energy"], predictions[1]["energy"], rtol=1e-5, atol=1e-5)
    assert (tmp_path / "validate" / "results" / "metrics.json").is_file()


def test_a_model_without_blocks_runs_as_it_is(data: Path, tmp_path: Path, counter: Counter, caplog) -> None:
    arguments = _config(tmp_path, data)
    config = yaml.safe_load((tmp_path / "config.yml").read_text())
    config["model"] = {"name": "test_backbone.PullBackbone", "heads": {"energy": {"module": "test_backbone.PullHead"}}}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    assert main([*arguments, "run", "--compile"]) == 0
    assert counter.count == 0
    assert caplog.text.count("no FAENet block") == 1


def test_gradients_that_cannot_be_compiled_are_one_warning(data: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    _use_backend(aot_autograd(fw_compiler=boxed_nop, bw_compiler=_no_backward), monkeypatch)
    arguments = _config(tmp_path, data)
    assert main([*arguments, "eager"]) == 0
    assert main([*arguments, "compiled", "--compile"]) == 0

    (warning,) = [line for line in caplog.messages if "compile: failed" in line]
    assert "gradients cannot be compiled here" in warning
    _assert_same_result(tmp_path / "eager", tmp_path / "compiled", tolerance=0)


def test_two_ranks(data: Path, tmp_path: Path, counter: Counter) -> None:
    arguments = _config(tmp_path, data)
    assert main([*arguments, "eager"]) == 0
    log = tmp_path / "log"
    ranks = processes.forked([*arguments, "compiled", "--compile"], log, ranks=2)
    assert processes.finish(ranks) == [0, 0], log.read_text()[-3000:]

    assert "compile: failed" not in log.read_text()
    _assert_same_result(tmp_path / "eager", tmp_path / "compiled", tolerance=2e-4)


def test_compiled_code_is_kept_in_the_home_folder(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = torch.nn.Linear(2, 2)
    own = tmp_path / ".cache" / "faenet-ocp" / "inductor"
    for given, expected in ((None, own), (default_cache_dir(), own), ("elsewhere", Path("elsewhere"))):
        if given is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        compilation.compile_model(model)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(expected)
    assert own.is_dir()

    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    compilation.compile_model(model)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    assert "compile: compiled code is not kept in" in caplog.text


# ------------------------------------------------------------------------------------------ the real compiler


@pytest.mark.slow
def test_code_is_taken_from_the_cache_of_an_earlier_run(data: Path, tmp_path: Path, caplog) -> None:
    arguments = _config(tmp_path, data)
    assert main([*arguments, "eager"]) == 0
    for run in ("first", "second"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert main([*arguments, run, "--compile"]) == 0
        hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
        assert (hits >= 3) == (run == "second")  # training forwards and backwards, evaluation
        _assert_same_result(tmp_path / "eager", tmp_path / run)
    assert "compile: failed" not in caplog.text


@pytest.mark.slow
def test_without_a_compiler(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = _config(tmp_path, data)
    output = processes.run([*arguments, "run", "--compile"])

    assert output.count("compile: failed") == 1
    assert "no-such-compiler" in output
    assert (tmp_path / "run" / "results" / "metrics.json").is_file()
