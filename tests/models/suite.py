"""What every registered model has to do. The tests of a model are a subclass of `ModelSuite` with its name and options.

Golden numbers: run the test and copy what it found, when a change of the numbers is intended.
"""

import copy
import io
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from torch import Tensor, nn
from torch_geometric.nn.models import dimenet_utils

import small_data
from faenet_ocp.graph.neighbors import build_graph
from faenet_ocp.kernels import accelerate
from faenet_ocp.models import fairchem as faenet_models  # noqa: F401  # registers FAENet and its heads
from faenet_ocp.models.frame_averaging import FrameAveragedModel
from faenet_ocp.targets import TARGETS

for _function in ("bessel_basis", "real_sph_harm"):  # a second of algebra for every network made, always the same
    setattr(dimenet_utils, _function, cache(getattr(dimenet_utils, _function)))

SMALL_FAENET = {
    "hidden_channels": 48,
    "num_filters": 24,
    "num_interactions": 2,
    "num_gaussians": 10,
    "tag_hidden_channels": 8,
    "pg_hidden_channels": 4,
}


def make_sample(
    pos: Tensor, numbers: Sequence[int], tags: Sequence[int], cell: Tensor | None = None, *, cutoff: float = 5.0
) -> AtomicData:
    """A system with its graph; without a cell it is not periodic."""
    n, periodic = len(pos), torch.full((3,), cell is not None)
    cell = torch.zeros(3, 3).to(pos) if cell is None else cell
    edge_index, offsets = build_graph(pos, cell, periodic, cutoff=cutoff, max_neighbors=20)
    return AtomicData(
        pos=pos,
        atomic_numbers=torch.tensor(numbers),
        cell=cell[None],
        pbc=periodic[None],
        natoms=torch.tensor([n]),
        edge_index=edge_index,
        cell_offsets=offsets.to(pos),
        nedges=torch.tensor([edge_index.shape[1]]),
        charge=torch.zeros(1, dtype=torch.long),
        spin=torch.zeros(1, dtype=torch.long),
        fixed=torch.zeros(n, dtype=torch.long),
        tags=torch.tensor(tags),
        sid=["system"],
    )


def slab(index: int, dtype: torch.dtype = torch.float64, *, motion: Tensor | None = None) -> AtomicData:
    """A periodic slab, moved by an orthogonal matrix and a shift, with its graph built anew."""
    atoms = small_data.make_slab(index)
    pos, cell = torch.tensor(atoms.positions, dtype=dtype), torch.tensor(atoms.cell.array, dtype=dtype)
    if motion is not None:
        pos, cell = pos @ motion.to(dtype) + torch.tensor([1.3, -0.4, 0.0], dtype=dtype), cell @ motion.to(dtype)
    return make_sample(pos, atoms.numbers.tolist(), atoms.get_tags().tolist(), cell)


def single_atom(number: int = 29, dtype: torch.dtype = torch.float64) -> AtomicData:
    return make_sample(torch.ones(1, 3, dtype=dtype), [number], [1])


def to_batch(samples: Sequence[AtomicData]) -> AtomicData:
    return atomicdata_list_to_batch(list(samples))


def slabs(count: int, dtype: torch.dtype = torch.float64, *, motion: Tensor | None = None) -> AtomicData:
    return to_batch([slab(index, dtype, motion=motion) for index in range(count)])


def orthogonal(seed: int, *, dim: int, det: float) -> Tensor:
    """A random orthogonal matrix by QR, independent of the package; z kept in 2D."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.det(q) * det < 0:
        q[:, 0] = -q[:, 0]
    full = torch.eye(3, dtype=torch.float64)
    full[:dim, :dim] = q
    return full


def outputs_of(model: nn.Module, batch: AtomicData) -> tuple[Tensor, Tensor]:
    """Energies and forces, which are -dE/dX where the model has no head for them."""
    if "forces" in model.output_heads:
        outputs = model(batch)
        return outputs["energy"]["energy"], outputs["forces"]["forces"]
    batch = batch.clone()
    batch.pos.requires_grad_()
    with torch.enable_grad():
        energy = model(batch)["energy"]["energy"]
        (slope,) = torch.autograd.grad(energy.sum(), batch.pos, create_graph=True)
    return energy, -slope


def gradients_of(model: nn.Module, batch: AtomicData) -> dict[str, Tensor | None]:
    """Of a loss on energies and forces, by parameter."""
    energy, forces = outputs_of(model, batch)
    parameters = dict(model.named_parameters())
    loss = energy.square().sum() + forces.square().sum()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))


class ModelSuite:
    """Tests of one registered backbone with heads for energies and forces.

    Attributes:
        name: in fairchem's registry.
        options: of the backbone.
        heads: as `model.heads`; None takes the backbone's own.
        symmetric: whether the model is equivariant without frames; "SE" if for rotations only.
        golden: energies and the force on the first atom of two slabs, seeded, without frames.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    heads: ClassVar[dict[str, Any] | None] = None
    symmetric: ClassVar[bool | str] = False
    golden: ClassVar[tuple[float, ...]] = ()

    def model(self, method: str = "none", *, dim: int = 3, group: str = "E", dtype: torch.dtype = torch.float64) -> Any:
        """Seeded, in evaluation mode, with statistics of norms as after some training."""
        torch.manual_seed(1)
        heads = self.heads or registry.get_model_class(self.name).default_heads(TARGETS.values())
        frames = {"method": method, "dim": dim, "group": group}
        model = FrameAveragedModel(backbone={"model": self.name, **self.options}, heads=heads, frames=frames).to(dtype)
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.uniform_(-0.1, 0.1)
        return model.eval()

    def errors(self, model: nn.Module, *, dim: int, det: float, dtype: torch.dtype = torch.float64) -> list[float]:
        """Largest change of energies, and of forces turned back, over moved copies; of the largest if above 1."""
        worst = [0.0, 0.0]
        with torch.no_grad():
            energy, forces = outputs_of(model, slabs(3, dtype))
            for seed in range(2):
                motion = orthogonal(seed, dim=dim, det=det)
                moved_energy, moved_forces = outputs_of(model, slabs(3, dtype, motion=motion))
                changes = (moved_energy - energy, moved_forces - forces @ motion.to(dtype))
                worst = [max(old, float(new.detach().abs().max())) for old, new in zip(worst, changes, strict=True)]
        return [
            error / max(1.0, float(size.detach().abs().max()))
            for error, size in zip(worst, (energy, forces), strict=True)
        ]

    @pytest.mark.parametrize("dim", [2, 3])
    @pytest.mark.parametrize("method", ["full", "canonical"])
    def test_full_and_canonical_frames_are_exact(self, method: str, dim: int) -> None:
        for det in (1.0, -1.0):
            assert max(self.errors(self.model(method, dim=dim), dim=dim, det=det)) < 1e-9
            single = self.model(method, dim=dim, dtype=torch.float32)
            assert max(self.errors(single, dim=dim, det=det, dtype=torch.float32)) < 1e-4

    def test_special_frames_are_exact_for_rotations_only(self) -> None:
        model = self.model("full", group="SE")
        assert max(self.errors(model, dim=3, det=1.0)) < 1e-9
        assert self.symmetric is True or max(self.errors(model, dim=3, det=-1.0)) > 1e-4

    @pytest.mark.parametrize("method, dim", [("none", 3), ("det", 3), ("stochastic", 3), ("full", 2)])
    def test_symmetry_is_lost_without_frames(self, method: str, dim: int) -> None:
        """Or with random ones, or frames that keep z: the negative control, the same test has to fail."""
        group = "SE" if self.symmetric == "SE" else "E"
        errors = self.errors(self.model(method, dim=dim, group=group), dim=3, det=1.0)
        assert max(errors) < 1e-9 if self.symmetric else min(errors) > 1e-4

    @pytest.mark.parametrize("method", ["none", "full", "canonical"])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-10)])
    def test_predictions_do_not_depend_on_companions(self, method: str, dtype: torch.dtype, tolerance: float) -> None:
        model = self.model(method, dtype=dtype)
        samples = [slab(0, dtype), single_atom(dtype=dtype), slab(1, dtype), slab(2, dtype)]
        alone = [outputs_of(model, to_batch([sample])) for sample in samples]
        for order in ([0, 1, 2, 3], [2, 1], [3, 0, 1, 2]):
            together = outputs_of(model, to_batch([samples[place] for place in order]))
            for found, part in zip(together, (0, 1), strict=True):
                expected = torch.cat([alone[place][part] for place in order])
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    def test_every_parameter_receives_a_gradient(self) -> None:
        gradients = gradients_of(self.model().train(), slabs(3))
        assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
        assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)

    def test_without_edges_all_is_finite(self) -> None:
        batch = to_batch([single_atom(29), single_atom(8)])
        assert batch.edge_index.shape == (2, 0)
        for method in ("none", "full"):
            model = self.model(method)
            assert all(output.isfinite().all() for output in outputs_of(model, batch))
            gradients = gradients_of(model, batch)
            assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)

    def test_autocast_is_near_and_its_outputs_are_in_full_precision(self) -> None:
        model = self.model("canonical", dtype=torch.float32)
        exact = outputs_of(model, slabs(3, torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = outputs_of(model, slabs(3, torch.float32))
        for ours, theirs in zip(rounded, exact, strict=True):
            assert ours.dtype == torch.float32
            assert 0 < (ours - theirs).abs().max() < 0.1 * theirs.abs().max()

    def test_saved_loaded_and_copied(self) -> None:
        model, batch = self.model(), slabs(2)
        expected = outputs_of(model, batch)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = self.model()
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.zero_()
        loaded.load_state_dict(torch.load(file, weights_only=True))
        for other in (loaded, copy.deepcopy(model)):
            assert all(torch.equal(a, b) for a, b in zip(outputs_of(other, batch), expected, strict=True))

    def test_accelerated_equals_plain(self) -> None:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
            plain, fast, batch = self.model("full", dtype=dtype), self.model("full", dtype=dtype), slabs(2, dtype)
            accelerate(fast)
            assert fast.state_dict().keys() == plain.state_dict().keys()
            expected = [*outputs_of(plain, batch), *gradients_of(plain, batch).values()]
            found = [*outputs_of(fast, batch), *gradients_of(fast, batch).values()]
            for ours, theirs in zip(found, expected, strict=True):
                if ours is not None and theirs is not None:
                    scale = float(theirs.detach().abs().max().clamp(min=1e-3))
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)

    def test_golden_numbers(self) -> None:
        energy, forces = outputs_of(self.model(), slabs(2))
        found = (*energy.tolist(), *forces[0].tolist())
        assert found == pytest.approx(self.golden, rel=1e-5, abs=1e-6)


def check_supercell(suite: ModelSuite) -> None:
    """A supercell has the energy of its cells, and their forces."""
    model, cells = suite.model(), []
    for atoms in (small_data.make_slab(1), small_data.make_slab(1).repeat((2, 1, 1))):
        pos, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
        cells.append(make_sample(pos, atoms.numbers.tolist(), atoms.get_tags().tolist(), cell, cutoff=4.0))
    energy, forces = (output.detach() for output in outputs_of(model, to_batch(cells)))
    assert float(energy[1]) == pytest.approx(2 * float(energy[0]), rel=1e-9)
    single = len(cells[0].pos)
    torch.testing.assert_close(forces[single : 2 * single], forces[:single], rtol=1e-8, atol=1e-9)
