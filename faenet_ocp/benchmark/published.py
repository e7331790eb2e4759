"""The authors' package `faenet` 0.1.3 made to run with today's libraries.

It takes `scatter` from torch_scatter, which would have to be compiled, and reads from mendeleev what mendeleev 1.x no
longer offers. Both are put right while the model is built, with the element values of our table; nothing else changes.
"""

import sys
import types
from unittest.mock import patch

import torch
from torch import nn
from torch_geometric.utils import scatter

from faenet_ocp.common.elements import NUM_GROUPS, PROPERTIES, element_table


def build_published(options: dict, *, forces: bool, force_hidden_channels: int) -> nn.Module:
    """The package's FAENet with these options of ours.

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
        known = {name: value for name, value in options.items() if name not in ("graph_norm", "skip_co")}
        return faenet.model.FAENet(
            **known,
            graph_norm=True,
            skip_co=False if options["skip_co"] == "none" else options["skip_co"],
            regress_forces="direct" if forces else None,
            force_decoder_type="mlp",
            force_decoder_model_config={"mlp": {"hidden_channels": force_hidden_channels, "norm": "batch1d"}},
        )
