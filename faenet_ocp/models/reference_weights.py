"""Weights of the authors' code into ours: package `faenet` 0.1.3, or FAENet of their fork of OCP.

Their single model holds what `FAENet`, `EnergyHead` and `ForceHead` hold here, under other names.
Options have to be those of the trained model, and

- mp_type "simple" of the package (the fork's "sfarinet") is "basic" here;
- their graph_norm: true is "batch" here. With "system" the weights load too, and give other
  numbers, on which a prediction no longer depends on its batch companions;
- their force head's `hidden_channels` and `norm` are `force_hidden_channels` and `force_norm`.

Their element table ends at 84 (and has no row for the lanthanides where period and group are
used). Weights for the other elements do not exist: the model refuses such elements after loading
(`AtomEmbedding.known_elements`), also when it is saved and read again.
"""

import logging
import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from faenet_ocp.models.embedding import AtomEmbedding
from faenet_ocp.models.faenet import FAENet
from faenet_ocp.models.heads import EnergyHead, ForceHead

logger = logging.getLogger(__name__)

# Beginning of our name -> beginning of theirs. A beginning that does not end in a dot is complete.
_EMBEDDING = {
    "atom_embedding.element.": "embed_block.emb.",
    "atom_embedding.tag.": "embed_block.tag_embedding.",
    "atom_embedding.period_embedding.": "embed_block.period_embedding.",
    "atom_embedding.group_embedding.": "embed_block.group_embedding.",
    "atom_embedding.period": "embed_block.phys_emb.period",
    "atom_embedding.group": "embed_block.phys_emb.group",
    "atom_embedding.properties": "embed_block.phys_emb.properties",
    "atom_embedding.lin_properties.": "embed_block.phys_lin.",
    "atom_embedding.lin.": "embed_block.lin.",
    "atom_embedding.lin_2.": "embed_block.lin_2.",
    "edge_embedding.smearing.": "distance_expansion.",
    "edge_embedding.lin.": "embed_block.lin_e1.",
    "edge_embedding.lin_rbf.": "embed_block.lin_e12.",
    "edge_embedding.lin_2.": "embed_block.lin_e2.",
    "lin_skip.": "mlp_skip_co.",
}
_BLOCK = {
    "norm.": "graph_norm.",
    "filter.lin.": "lin_geom.",
    "lin_filter.": "lin_geom.",
    "lin_query.": "lin_geom.lin_query.",
    "lin_key.": "lin_geom.lin_key.",
    "lin_value.": "lin_geom.lin_value.",
    "lin_edge.": "lin_geom.lin_edge.",
    "lin_down.": "lin_down.",
    "lin_complex.": "other_mlp.",
}
_ENERGY = {
    "lin_1.": "output_block.lin1.",
    "lin_2.": "output_block.lin2.",
    "lin_skip.": "mlp_skip_co.",
}

_TABLES = re.compile(r"atom_embedding\.(element|properties|period|group)")
"""Ours with a row for every element, period or group; theirs may have fewer rows."""

_NO_EFFECT = re.compile(r"\.lin_geom\.(lin_skip\.|lin_key\.bias$)")
"""Theirs in attention blocks: a layer that is never used, a bias that the softmax cancels."""


def load_reference_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    model: FAENet,
    energy_head: EnergyHead | None = None,
    force_head: ForceHead | None = None,
) -> None:
    """Load weights of the authors' code. Nothing is changed when they do not fit.

    Args:
        state_dict: of their model; any leading `module.` of wrappers is ignored.
        model: network with the options of theirs (see the top of this file).
        energy_head: takes their output block; None leaves it aside.
        force_head: takes their force decoder; None leaves it aside.

    Raises:
        ValueError: naming the weights that are missing, left over, or of another shape.
    """
    theirs = {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in state_dict.items()}
    parts: list[tuple[nn.Module, dict[str, str]]] = [(model, _trunk_names(model))]
    if energy_head is not None:
        parts.append((energy_head, _energy_names(energy_head)))
    if force_head is not None:
        parts.append((force_head, _force_names(force_head, theirs)))

    problems = _left_over(theirs, parts, energy_head, force_head)
    copies = []
    for module, names in parts:
        tensors = module.state_dict()
        for name, their_name in names.items():
            if their_name not in theirs:
                problems.append(f"{their_name} (here {name}) is missing")
            elif (pair := _match(name, tensors[name], theirs[their_name])) is None:
                shapes = f"{tuple(theirs[their_name].shape)}, here {tuple(tensors[name].shape)}"
                problems.append(f"{their_name} (here {name}) has shape {shapes}")
            else:
                copies.append(pair)
    if problems:
        raise ValueError("weights that do not fit the options given:\n  " + "\n  ".join(problems))
    _check_cutoff(model, theirs)
    if model.options.graph_norm == "system" and any(".graph_norm." in name for name in theirs):
        warnings.warn(
            "these weights were trained with graph_norm 'batch', statistics over all atoms of a "
            "batch; with 'system' the predictions are others than those of the authors' code",
            stacklevel=2,
        )
    with torch.no_grad():
        for destination, source in copies:
            destination.copy_(source)
    _mark_known_elements(model.atom_embedding, theirs)


def _rename(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            return theirs + name[len(ours) :]
    raise ValueError(f"{name} has no counterpart in the authors' code")


def _trunk_names(model: FAENet) -> dict[str, str]:
    """Our names of the network's tensors -> theirs."""
    update = "lin_up." if model.options.mp_type.startswith("updown") else "lin_h."
    block_table = _BLOCK | {"lin_out.": update}
    names = {}
    for name in model.state_dict():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            names[name] = f"interaction_blocks.{index}.{_rename(rest, block_table)}"
        elif name != "atom_embedding.known_elements":
            names[name] = _rename(name, _EMBEDDING)
    return names


def _energy_names(head: EnergyHead) -> dict[str, str]:
    initial = head.options.energy_head == "weighted-av-initial-embeds"
    table = _ENERGY | {"lin_weight.": "w_lin." if initial else "output_block.w_lin."}
    return {name: _rename(name, table) for name in head.state_dict()}


def _force_names(head: ForceHead, theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """Layers in the order of the calculation; their numbers depend on dropout layers between."""
    ours = list(dict.fromkeys(name.rpartition(".")[0] for name in head.state_dict()))
    found = {name.rpartition(".")[0] for name in theirs if name.startswith("decoder.")}
    layers = sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    if len(layers) != len(ours):
        raise ValueError(
            f"the weights have a force decoder of {len(layers)} layers, the force head has "
            f"{len(ours)}: other force_decoder_type or force_norm?"
        )
    layer = dict(zip(ours, layers, strict=True))
    return {name: ".".join([layer[name.rpartition(".")[0]], name.rpartition(".")[2]]) for name in head.state_dict()}


def _left_over(
    theirs: Mapping[str, Tensor],
    parts: list[tuple[nn.Module, dict[str, str]]],
    energy_head: EnergyHead | None,
    force_head: ForceHead | None,
) -> list[str]:
    """Their weights that nothing takes, other than those of a head that was not given."""
    used = {their_name for _, names in parts for their_name in names.values()}
    aside: tuple[str, ...] = ()
    if energy_head is None:
        aside += ("output_block.", "w_lin.", "mlp_skip_co.")
    if force_head is None:
        aside += ("decoder.",)
    rest = [name for name in theirs if name not in used and not _NO_EFFECT.search(name)]
    if ignored := [name for name in rest if name.startswith(aside)]:
        logger.warning("weights of heads that were not given are left aside: %s", ignored)
    return [f"{name} is left over" for name in rest if not name.startswith(aside)]


def _match(name: str, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where to copy what; None when the shapes do not allow it."""
    if _TABLES.match(name) and theirs.shape[1:] == ours.shape[1:] and len(theirs) <= len(ours):
        return ours[1 : len(theirs)], theirs[1:]  # row 0 is nobody's
    return (ours, theirs) if ours.shape == theirs.shape else None


def _check_cutoff(model: FAENet, theirs: Mapping[str, Tensor]) -> None:
    ours, given = model.edge_embedding.smearing.offset, theirs["distance_expansion.offset"]
    if not torch.allclose(ours.cpu().double(), given.cpu().double(), atol=1e-4):
        raise ValueError(f"cutoff: {ours[-1].item():g}, but the weights were trained with {given[-1].item():g}")


def _mark_known_elements(embedding: AtomEmbedding, theirs: Mapping[str, Tensor]) -> None:
    """Elements are known whose number, period and group all had a row in the loaded tables."""
    known = torch.zeros_like(embedding.known_elements)
    known[1 : len(theirs["embed_block.emb.weight"])] = True
    if embedding.has_properties:
        known[len(theirs["embed_block.phys_emb.properties"]) :] = False
    if embedding.has_period_group:
        known &= embedding.period < len(theirs["embed_block.period_embedding.weight"])
        known &= embedding.group < len(theirs["embed_block.group_embedding.weight"])
    embedding.known_elements.copy_(known)
    logger.info("%d elements have weights: %s", known.sum(), known.nonzero().flatten().tolist())
