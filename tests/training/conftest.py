"""What all suites of this folder do without."""

from collections.abc import Iterator
from unittest import mock

import pytest

from faenet_ocp.evaluation import evaluator


@pytest.fixture(scope="module", autouse=True)
def _no_plots() -> Iterator[None]:
    """Plots take longer than all else in a run of this size."""
    with mock.patch.object(evaluator, "plot_parity"), mock.patch.object(evaluator, "plot_learning_curve"):
        yield
