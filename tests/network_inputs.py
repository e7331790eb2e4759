"""Small networks for tests and their inputs: periodic slabs, graphs from ASE's neighbour list."""

from typing import NamedTuple

import ase
import numpy as np
import torch
from ase.neighborlist import neighbor_list

from faenet_ocp.models.faenet import FAENet
from faenet_ocp.models.heads import EnergyHead, ForceHead
from small_data import make_slab

CUTOFF = 4.0
SMALL = {
    "hidden_channels": 40,
    "num_filters": 24,
    "num_interactions": 2,
    "num_gaussians": 8,
    "cutoff": 4.0,
    "tag_hidden_channels": 4,
    "pg_hidden_channels": 4,
}
HEAD_OPTIONS = ("energy_head", "skip_co", "act")
TABLE_6 = {
    "FAENet": {},
    "only r_ij": {"edge_embed_type": "rij"},
    "only spherical harmonics": {"edge_embed_type": "sh"},
    "all": {"edge_embed_type": "all"},
    "two layers in the embedding MLPs": {"second_layer_MLP": True},
    "simple MP": {"mp_type": "simple"},
    "basic MP": {"mp_type": "basic", "num_filters": 40},
    "updownscale MP": {"mp_type": "updownscale"},
    "updownscale MP, filter from atoms too": {"mp_type": "updownscale_base"},
    "attention": {"mp_type": "base_with_att", "att_heads": 2},
    "no complex MP": {"complex_mp": False},
    "simple energy head": {"energy_head": "sum"},
    "no jumping connections": {"skip_co": "none"},
}
OTHERS = {
    "local environment": {"mp_type": "updown_local_env"},
    "graph transformer": {"mp_type": "att"},
    "weights from initial embeddings": {"energy_head": "weighted-av-initial-embeds"},
    "jumping connections added": {"skip_co": "add"},
    "jumping connections of atoms": {"skip_co": "concat_atom"},
    "no norm": {"graph_norm": "none"},
    "learnt properties": {"phys_hidden_channels": 6},
    "no properties": {"phys_embeds": False},
    "no tags, periods and groups": {"tag_hidden_channels": 0, "pg_hidden_channels": 0},
    "another activation": {"act": "gelu"},
}
VARIANTS = TABLE_6 | OTHERS


class Inputs(NamedTuple):
    """Arguments of `FAENet.forward`, and the structures they come from."""

    atoms: list[ase.Atoms]
    atomic_numbers: torch.Tensor
    tags: torch.Tensor
    batch: torch.Tensor
    edge_index: torch.Tensor
    offsets: torch.Tensor
    edge_vec: torch.Tensor

    @property
    def arguments(self) -> dict:
        names = ("atomic_numbers", "tags", "batch", "edge_index", "edge_vec")
        return {name: getattr(self, name) for name in names} | {"num_systems": len(self.atoms)}


def slabs(count: int, *, layers: int = 2) -> list[ase.Atoms]:
    """Slabs of 8 atoms with an adsorbate of 1 or 2; tags 0, 1 and 2."""
    return [make_slab(index, seed=7, layers=layers) for index in range(count)]


def make_inputs(systems: list[ase.Atoms], dtype: torch.dtype = torch.float32) -> Inputs:
    """Batch of systems; edges in order of their target, vectors pos[j] - pos[i] + image."""
    edges, offsets, vectors, first = [], [], [], 0
    for atoms in systems:
        target, source, shift, vector = neighbor_list("ijSD", atoms, CUTOFF)
        edges.append(np.stack([source, target]) + first)
        offsets.append(shift)
        vectors.append(vector)
        first += len(atoms)
    return Inputs(
        atoms=systems,
        atomic_numbers=torch.from_numpy(np.concatenate([a.numbers for a in systems])),
        tags=torch.from_numpy(np.concatenate([a.get_tags() for a in systems])),
        batch=torch.arange(len(systems)).repeat_interleave(torch.tensor([len(a) for a in systems])),
        edge_index=torch.from_numpy(np.concatenate(edges, axis=1)).long(),
        offsets=torch.from_numpy(np.concatenate(offsets)).to(dtype),
        edge_vec=torch.from_numpy(np.concatenate(vectors)).to(dtype),
    )


def build(dtype=torch.float32, force="mlp", norm="layer", seed=0, **options):
    """Network and heads, seeded; `options` may hold those of the energy head."""
    torch.manual_seed(seed)
    options = SMALL | options
    sizes = {name: options[name] for name in ("hidden_channels", "num_interactions")}
    head = {name: options[name] for name in HEAD_OPTIONS if name in options}
    trunk = {name: value for name, value in options.items() if name != "energy_head"}
    forces = ForceHead(
        hidden_channels=options["hidden_channels"], force_decoder_type=force, force_norm=norm, force_hidden_channels=12
    )
    return FAENet(**trunk).to(dtype), EnergyHead(**sizes, **head).to(dtype), forces.to(dtype)


def energies(parts, inputs):
    return predict(parts, inputs)[0]


def predict(parts, inputs):
    """Energies and forces; as in fairchem, heads are outside autocast."""
    features = parts[0](**inputs.arguments)
    with torch.autocast("cpu", enabled=False):
        return parts[1](features, inputs.batch, len(inputs.atoms)), parts[2](features.node_embedding)
