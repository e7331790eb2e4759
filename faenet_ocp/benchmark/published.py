"""The authors' package `faenet` 0.1.3 made to run with today's libraries.

It takes `scatter` from torch_scatter, which would have to be compiled, and reads from mendeleev what mendeleev 1.x no
longer offers. Both are put right while the model is built, with the element values of our table; nothing else changes.
"""

import sys
import types
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch_geometric.utils import scatter

from faenet_ocp.common.elements import NUM_GROUPS, PROPERTIES, element_table

_OURS = {"name", "max_neighbors", "graph_norm", "skip_co", "force_decoder_type", "force_hidden_channels"}
_OURS |= {"edge_embed_type", "att_heads", "envelope"}
"""Options that the package does not have, or names otherwise."""


def build_published(options: Mapping[str, Any], *, forces: bool) -> nn.Module:
    """The package's FAENet with these options of ours (the section `model:`).

    Raises:
        ImportError: the package is not installed (extra `reference`).
    """
    import pandas

    shim = types.ModuleType("torch_scatter")
    shim.scatter = scatter  # type: ignore[attr-defined]
    missing = sys.modules.setdefault("torch_scatter", shim) is shim
    try:
        import faenet.embedding
        import faenet.model
    finally:
        if missing:
            del sys.modules["torch_scatter"]
    table = element_table()
    columns = dict(zip(PROPERTIES, table.properties[1:].T.numpy(), strict=True))
    energies = {name: columns.pop(name) for name in ("IE1", "IE2")}
    group = table.group[1:].double()
    group[group == NUM_GROUPS] = torch.nan
    frame = pandas.DataFrame({**columns, "group_id": group.numpy(), "period": table.period[1:].numpy()})
    frame["atomic_number"] = range(1, len(frame) + 1)
    ionisation = pandas.DataFrame(energies, index=frame["atomic_number"])
    with (
        patch.object(faenet.embedding, "fetch_table", lambda name: frame.copy()),
        patch.object(faenet.embedding, "fetch_ionization_energies", lambda degree: ionisation),
    ):
        return faenet.model.FAENet(
            **{name: value for name, value in options.items() if name not in _OURS},
            graph_norm=True,
            skip_co=False if options["skip_co"] == "none" else options["skip_co"],
            regress_forces="direct" if forces else None,
            force_decoder_type="mlp",
            force_decoder_model_config={
                "mlp": {"hidden_channels": options.get("force_hidden_channels", 0), "norm": "batch1d"}
            },
        )
