"""What a network can tell apart (the paper's Tables 3 to 5, after Joshi et al., ICML 2023): pairs of small graphs.

A network is trained to tell two graphs apart, with the published protocol: both graphs, not moved, are training and
test set at once, and the best epoch counts. Beside that number stand the accuracy after the last epoch, and on moved
copies of both graphs, which is what symmetry is about; and whether the two are the same graph, turned or mirrored, so
that an exactly invariant network must not tell them apart.

Coordinates in Angstrom. All atoms are of one element; edges are given, not found.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.base import HeadInterface
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import ReduceLROnPlateau

from faenet_ocp.frames.rotations import random_rotations
from faenet_ocp.models import fairchem as _networks  # noqa: F401  # registers them
from faenet_ocp.models.base import Backbone
from faenet_ocp.models.frame_averaging import FrameAveragedModel
from faenet_ocp.models.functional import segment_sum
from faenet_ocp.models.peers.layers import mlp

NUM_COPIES = 40
"""Moved copies of each graph."""
_CUTOFF, _CHANNELS = 10.0, 128
_RATE, _LOWEST_RATE, _FACTOR, _PATIENCE, _EPOCHS = 1e-4, 1e-5, 0.9, 25, 100
_CARBON = 6
_SAME = 1e-6
"""Angstrom; positions that are nearer are the same."""


@dataclass(frozen=True)
class Pair:
    """Two graphs to tell apart.

    Attributes:
        test: which of the paper's tests.
        name: of the pair in it.
        first, second: positions, (N, 3) each.
        edges: both directions of each, (2, E), the same for both.
        num_interactions: blocks of the network.
    """

    test: str
    name: str
    first: Tensor
    second: Tensor
    edges: Tensor
    num_interactions: int = 1


class Row(NamedTuple):
    """A network and its frames.

    Attributes:
        name: in tables.
        backbone: fairchem's mapping, without the number of blocks.
        blocks: the option that is their number.
        frames: of `compute_frames`.
    """

    name: str
    backbone: dict[str, Any]
    blocks: str
    frames: dict[str, Any]


class Accuracy(NamedTuple):
    """In percent: of the best epoch, after the last, and on moved copies after the last."""

    best: float
    final: float
    moved: float


def pairs() -> Iterator[Pair]:
    """All pairs, in the order of the paper's tables, and two with a scalene triangle, which it does not have."""
    for layers in range(1, 7):
        yield k_chain(4, layers)
    for spokes in (2, 3, 5, 7, 10):
        yield rotational_symmetry(spokes)
    body, triangle = [(5, 0, 5), (5, 5, 5), (-5, -5, 5)], [(3, 0, -4), (0, 0, 5), (-3, 0, -4)]
    scalene = [(3, 0, -4), (1, 0, 4), (-2.5, 0, -1)]
    yield star("body order", "2-body", [(5, 0, 0), (3, 0, 4)], [(5, 0, 0), (-5, 0, 0)])
    yield star("body order", "3-body", [*body, (0, 5, 5)], [*body, (0, -5, 5)])
    yield star("body order", "4-body", [*triangle, (0, 5, 0)], [*triangle, (0, -5, 0)])
    yield star("scalene triangle", "mirror images", [*scalene, (0, 5, 0)], [*scalene, (0, -5, 0)])
    yield star("scalene triangle", "in its plane", [*scalene, (5, 0, 0)], [*scalene, (-5, 0, 0)])


def k_chain(k: int, layers: int) -> Pair:
    """A path of k + 2 atoms whose first one is on one side or the other: its ends are k + 1 bonds apart."""
    chain = [(0.0, 5.0 * i, 0.0) for i in range(k)]
    end = (4.0, 5.0 * (k - 1) + 3, 0.0)
    first, second = (torch.tensor([(x, -3.0, 0.0), *chain, end], dtype=torch.float32) for x in (-4.0, 4.0))
    edges = torch.tensor([(i, i + 1) for i in range(k + 1)]).T
    return Pair("k-chains", f"k = {k}, {layers} layers", first, second, _both_ways(edges), layers)


def rotational_symmetry(spokes: int) -> Pair:
    """A star of spokes of equal length in a plane, and the same turned by 2 pi / (spokes + 1)."""
    angles = 2 * torch.pi * torch.arange(spokes) / spokes
    turned = angles + 2 * torch.pi / (spokes + 1)
    first, second = ([(float(a.cos()), float(a.sin()), 0.0) for a in found] for found in (angles, turned))
    return star("rotational symmetry", f"{spokes} spokes", first, second)


def star(test: str, name: str, first: Sequence[tuple], second: Sequence[tuple]) -> Pair:
    """Atoms around one in the origin, which is bound to each of them."""
    one, other = (torch.tensor([(0, 0, 0), *cloud], dtype=torch.float32) for cloud in (first, second))
    count = len(first)
    edges = torch.stack([torch.zeros(count, dtype=torch.long), torch.arange(1, count + 1)])
    return Pair(test, name, one, other, _both_ways(edges))


def _both_ways(edges: Tensor) -> Tensor:
    return torch.cat([edges, edges.flip(0)], dim=1)


def congruence(first: Tensor, second: Tensor) -> str:
    """Whether two clouds are one that is "rotated", only "mirrored", or "no" such pair.

    Two atoms of the first cloud, not on a line with its centre, are put on all pairs of the second.
    """
    a, b = (cloud.double() - cloud.double().mean(dim=0) for cloud in (first, second))
    independent, others = _independent(a), _independent(b)
    if not independent or not others:  # on a line: a turn by 180 degrees is all that there is
        along, other = (cloud.norm(dim=1).sort().values for cloud in (a, b))
        return "rotated" if not independent and not others and torch.allclose(along, other, atol=1e-3) else "no"
    found, (i, j) = set(), independent[0]
    for m, n in others:
        for sign in (1, -1):
            turn = torch.linalg.inv(_axes(a[i], a[j], 1)) @ _axes(b[m], b[n], sign)
            is_orthogonal = (turn @ turn.T - torch.eye(3).to(turn)).abs().max() < _SAME
            if is_orthogonal and torch.cdist(a @ turn, b).min(dim=1).values.max() < 1e3 * _SAME:
                found.add("rotated" if torch.det(turn) > 0 else "mirrored")
    return "rotated" if "rotated" in found else "mirrored" if found else "no"


def _independent(cloud: Tensor) -> list[tuple[int, int]]:
    """Ordered pairs of atoms that are not on a line with the centre."""
    every = itertools.permutations(range(len(cloud)), 2)
    return [(i, j) for i, j in every if torch.linalg.cross(cloud[i], cloud[j]).norm() > 0.1]


def _axes(first: Tensor, second: Tensor, sign: int) -> Tensor:
    """Two vectors and the one across, in rows; a mirror has the other sign."""
    return torch.stack([first, second, sign * torch.linalg.cross(first, second)])


class PooledClassifier(nn.Module, HeadInterface):
    """One number for each graph from the sum of its atoms' embeddings: positive for the second of a pair."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.layers = mlp(backbone.options.hidden_channels, _CHANNELS, 1)

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:
        """`{label: (B,)}`."""
        pooled = segment_sum(emb["features"].node_embedding, data.batch, len(data.natoms))
        return {"label": self.layers(pooled)[:, 0]}


def rows() -> list[Row]:
    """FAENet in all kinds of frames, and networks that need none."""
    faenet = {"model": "faenet", "hidden_channels": _CHANNELS, "num_filters": _CHANNELS, "num_gaussians": 50}
    faenet |= {"tag_hidden_channels": 0, "pg_hidden_channels": 16, "phys_embeds": False, "graph_norm": "none"}
    faenet |= {"cutoff": _CUTOFF, "skip_co": "none"}
    kinds = [("none", "E"), *((m, g) for g in ("E", "SE") for m in ("stochastic", "full", "canonical"))]
    found = []
    for method, group in kinds:
        name = "FAENet, no frames" if method == "none" else f"FAENet, {method}, {group}(3)"
        found.append(Row(name, faenet, "num_interactions", {"method": method, "dim": 3, "group": group}))
    others: dict[str, tuple[dict[str, Any], str]] = {
        "SchNet": ({"model": "schnet", "num_filters": _CHANNELS, "num_gaussians": 50}, "num_interactions"),
        "DimeNet++": ({"model": "dimenetpp", "out_emb_channels": _CHANNELS}, "num_blocks"),
        "PaiNN": ({"model": "painn"}, "num_interactions"),
        "EGNN": ({"model": "egnn"}, "num_interactions"),
    }
    for name, (backbone, blocks) in others.items():
        sizes = {"hidden_channels": _CHANNELS, "cutoff": _CUTOFF}
        found.append(Row(name, backbone | sizes, blocks, {"method": "none", "dim": 3, "group": "E"}))
    return found


def train(pair: Pair, row: Row, seed: int, *, epochs: int = _EPOCHS) -> Accuracy:
    """One network on one pair."""
    torch.manual_seed(seed)
    model = FrameAveragedModel(
        backbone={**row.backbone, row.blocks: pair.num_interactions},
        heads={"label": {"module": "expressivity_head"}},
        frames=row.frames,
        cutoff=None,
    )
    graphs = [_graph(pos, pair.edges) for pos in (pair.first, pair.second)]
    labels = torch.tensor([0.0, 1.0])
    both, each = atomicdata_list_to_batch(graphs), [atomicdata_list_to_batch([graph]) for graph in graphs]
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE, fused=True)
    schedule = {"mode": "max", "factor": _FACTOR, "patience": _PATIENCE, "min_lr": _LOWEST_RATE}
    scheduler = ReduceLROnPlateau(optimizer, **schedule)  # type: ignore[arg-type]
    best = final = 0.0
    for _ in range(epochs):
        model.train()
        for number in torch.randperm(2).tolist():
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(_logits(model, each[number]), labels[number : number + 1])
            loss.backward()
            optimizer.step()
        final = _accuracy(model, both, labels)
        scheduler.step(final)
        best = max(best, final)
    rot = random_rotations(NUM_COPIES, dim=3, reflect=False, dtype=torch.float32, device="cpu").rot[:, 0]
    copies = [_graph(pos @ turn + 10 * torch.rand(3), pair.edges) for pos in (pair.first, pair.second) for turn in rot]
    moved = _accuracy(model, atomicdata_list_to_batch(copies), labels.repeat_interleave(NUM_COPIES))
    return Accuracy(best, final, moved)


def _graph(pos: Tensor, edges: Tensor) -> AtomicData:
    count = len(pos)
    return AtomicData(
        pos=pos,
        atomic_numbers=torch.full((count,), _CARBON),
        cell=torch.zeros(1, 3, 3),
        pbc=torch.zeros(1, 3, dtype=torch.bool),
        natoms=torch.tensor([count]),
        edge_index=edges,
        cell_offsets=torch.zeros(edges.shape[1], 3),
        nedges=torch.tensor([edges.shape[1]]),
        charge=torch.zeros(1, dtype=torch.long),
        spin=torch.zeros(1, dtype=torch.long),
        fixed=torch.zeros(count, dtype=torch.long),
        tags=torch.zeros(count, dtype=torch.long),
        sid=["graph"],
    )


def _logits(model: FrameAveragedModel, batch: AtomicData) -> Tensor:
    return model(batch)["label"]["label"]


def _accuracy(model: FrameAveragedModel, batch: AtomicData, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = (_logits(model, batch) > 0) == (labels > 0.5)
    return 100 * float(right.float().mean())


def spread(found: Sequence[Accuracy]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds."""
    columns = zip(Accuracy._fields, zip(*found, strict=True), strict=True)
    return {name: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for name, v in columns}


registry.register_model("expressivity_head")(PooledClassifier)
