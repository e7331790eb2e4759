"""Equal outputs from equal weights: the authors' package `faenet` 0.1.3 against ours.

The package does not run as it is. It takes `scatter` from torch_scatter, which has to be compiled, reads from mendeleev
what mendeleev 1.x no longer offers, and one of its message passing types fails with today's torch_geometric. The
fixture `reference` puts that right, with the element values of our table.
"""

import itertools
import logging
import re
import sys
import types

import pytest
import torch
from torch.nn import functional
from torch_geometric.data import Data
from torch_geometric.nn import TransformerConv
from torch_geometric.utils import scatter

from faenet_ocp.common.elements import NUM_GROUPS, PROPERTIES, element_table
from faenet_ocp.models.base import check_elements
from faenet_ocp.models.faenet import FAENet
from faenet_ocp.models.heads import EnergyHead, ForceHead
from faenet_ocp.models.options import ENERGY_HEADS, FORCE_DECODERS, FORCE_NORMS, SKIP_CONNECTIONS
from faenet_ocp.models.reference_weights import load_reference_state_dict
from network_inputs import make_inputs, slabs

SIZES = {
    "hidden_channels": 48,
    "num_filters": 30,
    "num_interactions": 3,
    "num_gaussians": 10,
    "cutoff": 4.0,
    "tag_hidden_channels": 4,
    "pg_hidden_channels": 5,
    "second_layer_MLP": False,
    "complex_mp": False,
}
MP_TYPES = {  # name in the package -> here
    "base": "base",
    "simple": "basic",
    "updownscale": "updownscale",
    "updownscale_base": "updownscale_base",
    "updown_local_env": "updown_local_env",
}
OPTIONS = [
    *({"skip_co": skip_co, "energy_head": head} for skip_co, head in itertools.product(SKIP_CONNECTIONS, ENERGY_HEADS)),
    *({"decoder": decoder, "norm": norm} for decoder, norm in itertools.product(FORCE_DECODERS, FORCE_NORMS)),
    {"complex_mp": True},
    {"second_layer_MLP": True},
    {"complex_mp": True, "second_layer_MLP": True},
    {"graph_norm": False},
    {"phys_hidden_channels": 7},
    {"phys_embeds": False},
    {"tag_hidden_channels": 0, "pg_hidden_channels": 0},
    {"act": "relu"},
]
FORCE_SIZE = 20
pytestmark = pytest.mark.filterwarnings("ignore:graph_norm 'batch':UserWarning")


@pytest.fixture(scope="module")
def reference():
    """The package's model class; the tests that need it are skipped when it is not installed."""
    pandas = pytest.importorskip("pandas")
    with pytest.MonkeyPatch.context() as patch:
        shim = types.ModuleType("torch_scatter")
        shim.scatter = scatter
        patch.setitem(sys.modules, "torch_scatter", shim)
        pytest.importorskip("faenet", reason="extra `reference` is not installed")
        import faenet.embedding
        import faenet.model

        table = element_table()
        columns = dict(zip(PROPERTIES, table.properties[1:].T.numpy(), strict=True))
        energies = {name: columns.pop(name) for name in ("IE1", "IE2")}
        group = table.group[1:].double()
        group[group == NUM_GROUPS] = torch.nan
        frame = pandas.DataFrame(columns | {"group_id": group.numpy(), "period": table.period[1:].numpy()})
        frame["atomic_number"] = range(1, len(frame) + 1)
        ionisation = pandas.DataFrame(energies, index=frame["atomic_number"])
        patch.setattr(faenet.embedding, "fetch_table", lambda name: frame.copy())
        patch.setattr(faenet.embedding, "fetch_ionization_energies", lambda degree: ionisation)
        yield faenet.model.FAENet


@pytest.fixture(scope="module")
def batch():
    return make_inputs(slabs(4))


def run_theirs(model, batch):
    """What the package predicts for a batch, in the form that its `pbc_preprocess` takes."""
    data = Data(
        pos=torch.cat([torch.from_numpy(atoms.positions) for atoms in batch.atoms]).float(),
        atomic_numbers=batch.atomic_numbers,
        tags=batch.tags,
        batch=batch.batch,
        edge_index=batch.edge_index,
        cell=torch.stack([torch.from_numpy(atoms.cell.array) for atoms in batch.atoms]).float(),
        cell_offsets=batch.offsets,
        neighbors=torch.bincount(batch.batch[batch.edge_index[1]], minlength=len(batch.atoms)),
    )
    return model(data, mode="inference")


def run_ours(parts, batch):
    """Energies and node embeddings."""
    output = parts[0](**batch.arguments)
    return parts[1](output, batch.batch, len(batch.atoms)), output.node_embedding


def assert_equal_outputs(got, expected):
    """To 1e-5 of the largest value: float32 in another order of summation."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def build_ours(mp_type="base", energy_head="sum", skip_co="concat", decoder=None, norm="batch1d", **options):
    """Ours with the package's options."""
    torch.manual_seed(11)  # not the seed of theirs
    sizes = SIZES | {"graph_norm": True} | options
    if sizes["graph_norm"] is True:
        sizes["graph_norm"] = "batch"
    if mp_type == "simple":
        sizes["num_filters"] = sizes["hidden_channels"]
    common = {name: sizes[name] for name in ("hidden_channels", "act") if name in sizes}
    net = FAENet(mp_type=MP_TYPES[mp_type], skip_co=skip_co, **sizes)
    energy = EnergyHead(energy_head=energy_head, skip_co=skip_co, num_interactions=3, **common)
    force = {"force_decoder_type": decoder, "force_norm": norm, "force_hidden_channels": FORCE_SIZE}
    return net, energy, ForceHead(**force, **common) if decoder else None


def propagate(self, edge_index, x, W, local_env=None):
    """What PyG's did in its time: messages, summed over the edges of every target."""
    messages = self.message(x[edge_index[0]], W, local_env)
    return scatter(messages, edge_index[1], dim=0, dim_size=len(x))


def build_theirs(
    reference, mp_type="base", energy_head="sum", skip_co="concat", decoder=None, norm="batch1d", **options
):
    torch.manual_seed(0)
    model = reference(
        mp_type=mp_type,
        energy_head=None if energy_head == "sum" else energy_head,
        skip_co=False if skip_co == "none" else skip_co,
        regress_forces="direct" if decoder else None,
        force_decoder_type=decoder,
        force_decoder_model_config={decoder: {"hidden_channels": FORCE_SIZE, "norm": None if norm == "none" else norm}},
        **(SIZES | options),
    )
    if mp_type == "updown_local_env":  # PyG's own `propagate` refuses or forgets the optional argument
        for block in model.interaction_blocks:
            block.propagate = types.MethodType(propagate, block)
    for parameter in model.parameters():  # zero biases and unit scales would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def load(weights, parts):
    names = ("model", "energy_head", "force_head")
    load_reference_state_dict(weights, **dict(zip(names, parts, strict=True)))


def compare(reference, batch, **options):
    theirs, parts = build_theirs(reference, **options), build_ours(**options)
    load(theirs.state_dict(), parts)
    for mode in (True, False):  # BatchNorm of the force decoder; its statistics move first
        theirs.train(mode)
        for part in filter(None, parts):
            part.train(mode)
        expected, (energy, embedding) = run_theirs(theirs, batch), run_ours(parts, batch)
        assert energy.std() > 0
        assert_equal_outputs(energy, expected["energy"][:, 0])
        assert_equal_outputs(embedding, expected["hidden_state"])
        if parts[2] is not None:
            assert_equal_outputs(parts[2](embedding), expected["forces"])


@pytest.mark.parametrize("mp_type", MP_TYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_everything_that_the_package_offers(reference, batch, mp_type, options):
    compare(reference, batch, mp_type=mp_type, **options)


def test_settings_of_the_paper_for_is2re(reference, batch):
    sizes = {"hidden_channels": 384, "num_filters": 480, "num_gaussians": 104, "cutoff": 6.0}
    sizes |= {"tag_hidden_channels": 64, "pg_hidden_channels": 64, "complex_mp": True}
    compare(reference, batch, energy_head="weighted-av-final-embeds", **sizes)


def test_a_changed_weight_is_seen_and_names_of_wrappers_are_not(reference, batch):
    """Negative control."""
    theirs, parts = build_theirs(reference), build_ours()
    load({f"module.module.{name}": tensor for name, tensor in theirs.state_dict().items()}, parts)
    expected = run_theirs(theirs, batch)["energy"][:, 0]
    assert_equal_outputs(run_ours(parts, batch)[0], expected)
    parts[0].blocks[2].filter.lin.weight.data[0, -1] += 0.5
    assert not torch.allclose(run_ours(parts, batch)[0], expected, rtol=1e-5, atol=1e-5)


def test_our_element_table_standardised_is_theirs(reference):
    theirs, net = reference(**SIZES).embed_block.phys_emb, build_ours()[0].atom_embedding
    torch.testing.assert_close(net.properties[: len(theirs.properties)], theirs.properties)
    assert torch.equal(net.group[1 : len(theirs.group)], theirs.group[1:])
    assert torch.equal(net.period[1 : len(theirs.period)], theirs.period[1:])


def test_statistics_over_each_system_are_others(reference, batch):
    theirs, parts = build_theirs(reference), (FAENet(**SIZES, mp_type="base"), *build_ours()[1:])
    with pytest.warns(UserWarning, match="trained with graph_norm 'batch'"):
        load(theirs.state_dict(), parts)
    alone = make_inputs(batch.atoms[:1])
    energy, expected = run_ours(parts, alone)[0], run_theirs(theirs, alone)["energy"][:, 0]
    assert_equal_outputs(energy, expected)  # one system: the same
    assert_equal_outputs(run_ours(parts, batch)[0][:1], energy)
    assert (run_theirs(theirs, batch)["energy"][0, 0] - expected[0]).abs() > 1e-3


def test_elements_without_weights_are_refused(reference):
    net = build_ours()[0]
    load_reference_state_dict(build_theirs(reference).state_dict(), model=net)
    known = net.atom_embedding.known_elements
    check_elements(torch.tensor([1, 29, 57, 72, 84]), known)
    with pytest.raises(ValueError, match=r"element 58 \(Ce\), element 85 \(At\), element 118 \(Og\)$"):
        check_elements(torch.tensor([118, 85, 78, 58]), known)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mp_type": "simple"}, r"lin_geom\.weight is left over"),
        ({"complex_mp": True}, r"other_mlp\.weight \(here blocks\.0\.lin_complex\.weight\) is missing"),
        ({"hidden_channels": 50}, r"lin_h\.weight .* has shape \(48, 48\), here \(50, 50\)"),
        ({"num_gaussians": 12}, r"distance_expansion\.offset .* has shape \(10,\), here \(12,\)"),
        ({"cutoff": 5.0}, "cutoff: 5, but the weights were trained with 4"),
        ({"skip_co": "none"}, r"mlp_skip_co\.weight is left over"),
        ({"energy_head": "weighted-av-final-embeds"}, r"output_block\.w_lin\.weight .*missing"),
        ({"pg_hidden_channels": 0}, r"phys_emb\.group is left over"),
        ({"decoder": "res"}, "force decoder of 3 layers, the force head has 7"),
    ],
)
def test_weights_that_do_not_fit(reference, options, message):
    parts = build_ours(**options)
    before = {name: tensor.clone() for name, tensor in parts[0].state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load(build_theirs(reference, decoder="mlp" if "decoder" in options else None).state_dict(), parts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts[0].state_dict().items())


def test_weights_of_a_head_that_is_not_given_are_left_aside(reference, caplog):
    caplog.set_level(logging.WARNING)
    load(build_theirs(reference, decoder="mlp").state_dict(), build_ours())
    assert re.search(r"left aside: \['decoder\.model\.0\.weight'", caplog.text)


# --- The authors' fork of OCP has more options; weights are made up here under its names ---

C, F, G = 12, 10, 6
SMALL = {"hidden_channels": C, "num_filters": F, "num_gaussians": G, "num_interactions": 1, "cutoff": 4.0}
BARE = {"tag_hidden_channels": 0, "pg_hidden_channels": 0, "phys_embeds": False}
PLAIN = {"complex_mp": False, "graph_norm": False, "skip_co": False}


def fork_weights(**modules):
    """Weights of the fork's model with one block, and those of modules under their names."""
    torch.manual_seed(4)
    modules |= {
        "embed_block.lin": torch.nn.Linear(C, C),
        "embed_block.lin_e1": torch.nn.Linear(3, F // 2),
        "embed_block.lin_e12": torch.nn.Linear(G, F - F // 2),
        "interaction_blocks.0.lin_h": torch.nn.Linear(C, C),
        "output_block.lin1": torch.nn.Linear(C, C // 2),
        "output_block.lin2": torch.nn.Linear(C // 2, 1),
    }
    weights = {"distance_expansion.offset": torch.linspace(0, 4, G), "embed_block.emb.weight": torch.randn(85, C)}
    for place, module in modules.items():
        weights |= {f"{place}.{name}": tensor for name, tensor in module.state_dict().items()}
    return weights


class MultiplyingConv(TransformerConv):
    """The fork's `base_with_att`: the edge embedding multiplies the values."""

    def message(self, query_i, key_j, value_j, edge_attr, index, ptr, size_i):
        edges = self.lin_edge(edge_attr).view(-1, self.heads, self.out_channels)
        nothing, ones = torch.zeros_like(edge_attr), torch.ones_like(value_j)
        weights = super().message(query_i, key_j, ones, nothing, index, ptr, size_i)
        return weights * value_j * edges


@pytest.mark.parametrize("kind, conv_class", [("att", TransformerConv), ("base_with_att", MultiplyingConv)])
def test_attention_of_the_fork(kind, conv_class, batch):
    torch.manual_seed(0)
    conv = conv_class(C, C, heads=3, concat=False, root_weight=False, edge_dim=F)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = fork_weights(**{"interaction_blocks.0.lin_geom": conv})
    assert "interaction_blocks.0.lin_geom.lin_key.bias" in weights
    net = FAENet(mp_type=kind, att_heads=3, **SMALL, **BARE, **PLAIN)
    load_reference_state_dict(weights, model=net)
    h = net.atom_embedding(batch.atomic_numbers, None)
    update = [weights[f"interaction_blocks.0.lin_h.{name}"] for name in ("weight", "bias")]
    messages = conv(h, batch.edge_index, net.edge_embedding(batch.edge_vec))
    expected = h + functional.silu(functional.linear(messages, *update))
    assert_equal_outputs(net(**batch.arguments).node_embedding, expected)


def test_force_decoder_of_the_fork_has_dropout_between():
    layers = [torch.nn.Linear(C, 7), torch.nn.BatchNorm1d(7), torch.nn.SiLU(), torch.nn.Dropout(0.1)]
    theirs = torch.nn.Sequential(*layers, torch.nn.Linear(7, 3)).eval()
    geom = torch.nn.Linear(F + 2 * C, C)
    weights = fork_weights(**{"interaction_blocks.0.lin_geom": geom, "decoder.model": theirs})
    force_head = ForceHead(hidden_channels=C, force_decoder_type="mlp", force_hidden_channels=7).eval()
    load_reference_state_dict(weights, model=FAENet(**SMALL, **BARE, **PLAIN), force_head=force_head)
    h = torch.randn(5, C)
    torch.testing.assert_close(force_head(h), theirs(h))
