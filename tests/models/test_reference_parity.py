"""Equal outputs from equal weights: the authors' package `faenet` 0.1.3 against ours.

The package does not run as it is. It takes `scatter` from torch_scatter, which has to be compiled,
reads from mendeleev what mendeleev 1.x no longer offers, and one of its message passing types fails
with today's torch_geometric. The fixture `reference` puts that right, with the element values of
our table.
"""

import itertools
import logging
import re
import sys
import types

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.nn import TransformerConv
from torch_geometric.utils import scatter

from faenet_ocp.common.elements import NUM_GROUPS, PROPERTIES, element_table
from faenet_ocp.models.base import check_elements
from faenet_ocp.models.faenet import FAENet
from faenet_ocp.models.heads import EnergyHead, ForceHead
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
ENERGY_HEADS = (None, "weighted-av-initial-embeds", "weighted-av-final-embeds")
DECODERS = ("simple", "mlp", "res", "res_updown")
FORCE_SIZE = 20


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


def package_data(batch):
    """The batch as the package's `pbc_preprocess` takes it."""
    edges = torch.bincount(batch.batch[batch.edge_index[1]], minlength=len(batch.atoms))
    return Data(
        pos=torch.cat([torch.from_numpy(atoms.positions) for atoms in batch.atoms]).float(),
        atomic_numbers=batch.atomic_numbers,
        tags=batch.tags,
        batch=batch.batch,
        edge_index=batch.edge_index,
        cell=torch.stack([torch.from_numpy(atoms.cell.array) for atoms in batch.atoms]).float(),
        cell_offsets=batch.offsets,
        neighbors=edges,
    )


def assert_equal_outputs(got, expected):
    """To 1e-5 of the largest value: float32 in another order of summation."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def build_ours(mp_type="base", energy_head=None, skip_co="concat", decoder=None, norm="batch1d", **options):
    """Ours with the package's options."""
    torch.manual_seed(11)  # not the seed of theirs
    sizes = SIZES | options
    sizes["graph_norm"] = "batch" if sizes.get("graph_norm", True) else "none"
    if mp_type == "simple":
        sizes["num_filters"] = sizes["hidden_channels"]
    common = {name: sizes[name] for name in ("hidden_channels", "act") if name in sizes}
    net = FAENet(mp_type=MP_TYPES[mp_type], skip_co=skip_co, **sizes)
    energy = EnergyHead(energy_head=energy_head, skip_co=skip_co, num_interactions=3, **common)
    force = decoder and ForceHead(
        force_decoder_type=decoder, force_norm=norm, force_hidden_channels=FORCE_SIZE, **common
    )
    return net, energy, force


def propagate(self, edge_index, x, W, local_env=None):
    """What PyG's did in its time: messages, summed over the edges of every target."""
    messages = self.message(x[edge_index[0]], W, local_env)
    return scatter(messages, edge_index[1], dim=0, dim_size=len(x))


def build_theirs(
    reference, mp_type="base", energy_head=None, skip_co="concat", decoder=None, norm="batch1d", **options
):
    torch.manual_seed(0)
    model = reference(
        mp_type=mp_type,
        energy_head=energy_head,
        skip_co=False if skip_co == "none" else skip_co,
        regress_forces="direct" if decoder else None,
        force_decoder_type=decoder,
        force_decoder_model_config={decoder: {"hidden_channels": FORCE_SIZE, "norm": norm}},
        **(SIZES | options),
    )
    if mp_type == "updown_local_env":  # PyG's own `propagate` refuses or forgets the optional argument
        for block in model.interaction_blocks:
            block.propagate = types.MethodType(propagate, block)
    for parameter in model.parameters():  # zero biases and unit scales would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.filterwarnings("ignore:graph_norm 'batch':UserWarning")
class TestPackage:
    """Everything that the package offers."""

    def compare(self, reference, batch, **options):
        theirs = build_theirs(reference, **options)
        net, energy_head, force_head = build_ours(**options)
        load_reference_state_dict(theirs.state_dict(), model=net, energy_head=energy_head, force_head=force_head)

        for mode in (True, False):  # BatchNorm of the force decoder; its statistics move first
            theirs.train(mode)
            for part in (net, energy_head, force_head or net):
                part.train(mode)
            expected = theirs(package_data(batch), mode="inference")
            output = net(**batch.arguments)
            energy = energy_head(output, batch.batch, len(batch.atoms))
            assert energy.std() > 0
            assert_equal_outputs(energy, expected["energy"][:, 0])
            assert_equal_outputs(output.node_embedding, expected["hidden_state"])
            if force_head is not None:
                forces = force_head(output.node_embedding)
                assert_equal_outputs(forces, expected["forces"])

    @pytest.mark.parametrize("mp_type, skip_co, energy_head", itertools.product(
        MP_TYPES, ["concat", "add", "concat_atom", "none"], ENERGY_HEADS))  # fmt: skip
    def test_message_passing_skip_connections_and_energy_heads(self, reference, batch, mp_type, skip_co, energy_head):
        self.compare(reference, batch, mp_type=mp_type, skip_co=skip_co, energy_head=energy_head)

    @pytest.mark.parametrize("norm", ["batch1d", "layer", None])
    @pytest.mark.parametrize("decoder", DECODERS)
    @pytest.mark.parametrize("mp_type", MP_TYPES)
    def test_force_decoders(self, reference, batch, mp_type, decoder, norm):
        self.compare(reference, batch, mp_type=mp_type, decoder=decoder, norm=norm)

    @pytest.mark.parametrize("mp_type", MP_TYPES)
    @pytest.mark.parametrize(
        "options",
        [
            {"complex_mp": True},
            {"second_layer_MLP": True},
            {"complex_mp": True, "second_layer_MLP": True},
            {"graph_norm": False},
            {"phys_hidden_channels": 7},
            {"phys_embeds": False},
            {"tag_hidden_channels": 0, "pg_hidden_channels": 0},
            {"act": "relu"},
        ],
    )
    def test_other_options(self, reference, batch, mp_type, options):
        self.compare(reference, batch, mp_type=mp_type, **options)

    def test_settings_of_the_paper_for_is2re(self, reference, batch):
        self.compare(
            reference,
            batch,
            energy_head="weighted-av-final-embeds",
            complex_mp=True,
            hidden_channels=384,
            num_filters=480,
            num_gaussians=104,
            cutoff=6.0,
            tag_hidden_channels=64,
            pg_hidden_channels=64,
        )

    def test_a_changed_weight_is_seen(self, reference, batch):
        """Negative control."""
        theirs = build_theirs(reference)
        net, energy_head, _ = build_ours()
        load_reference_state_dict(theirs.state_dict(), model=net, energy_head=energy_head)
        with torch.no_grad():
            net.blocks[2].filter.lin.weight[0, -1] += 0.5
        energy = energy_head(net(**batch.arguments), batch.batch, len(batch.atoms))
        expected = theirs(package_data(batch), mode="inference")["energy"][:, 0]

        assert not torch.allclose(energy, expected, rtol=1e-5, atol=1e-5)

    def test_our_element_table_standardised_is_theirs(self, reference):
        theirs = build_theirs(reference).embed_block.phys_emb
        net = build_ours()[0].atom_embedding

        torch.manual_seed(0)
        clean = reference(**SIZES).embed_block.phys_emb.properties
        torch.testing.assert_close(net.properties[: len(clean)], clean)
        assert torch.equal(net.group[1 : len(theirs.group)], theirs.group[1:])
        assert torch.equal(net.period[1 : len(theirs.period)], theirs.period[1:])

    def test_statistics_over_each_system_are_others(self, reference, batch):
        theirs = build_theirs(reference)
        net = FAENet(**SIZES, mp_type="base")
        energy_head = build_ours()[1]
        with pytest.warns(UserWarning, match="trained with graph_norm 'batch'"):
            load_reference_state_dict(theirs.state_dict(), model=net, energy_head=energy_head)
        alone = make_inputs(batch.atoms[:1])
        energy = energy_head(net(**alone.arguments), alone.batch, 1)

        expected = theirs(package_data(alone), mode="inference")["energy"][:, 0]
        assert_equal_outputs(energy, expected)  # one system: the same
        together = energy_head(net(**batch.arguments), batch.batch, len(batch.atoms))
        assert_equal_outputs(together[:1], energy)
        theirs_together = theirs(package_data(batch), mode="inference")["energy"][:, 0]
        assert (theirs_together[0] - expected[0]).abs() > 1e-3

    def test_elements_without_weights_are_refused(self, reference):
        net, _, _ = build_ours()
        load_reference_state_dict(build_theirs(reference).state_dict(), model=net)
        known = net.atom_embedding.known_elements
        check_elements(torch.tensor([1, 29, 57, 72, 84]), known)
        with pytest.raises(ValueError, match=r"element 58 \(Ce\), element 85 \(At\), element 118 \(Og\)$"):
            check_elements(torch.tensor([118, 85, 78, 58]), known)
        again = build_ours()[0]
        again.load_state_dict(net.state_dict())
        with pytest.raises(ValueError, match=r"element 85 \(At\)"):
            check_elements(torch.tensor([85]), again.atom_embedding.known_elements)

    def test_names_of_wrappers_are_ignored(self, reference, batch):
        theirs = build_theirs(reference)
        weights = {f"module.module.{name}": tensor for name, tensor in theirs.state_dict().items()}
        net, energy_head, _ = build_ours()
        load_reference_state_dict(weights, model=net, energy_head=energy_head)

        energy = energy_head(net(**batch.arguments), batch.batch, len(batch.atoms))
        expected = theirs(package_data(batch), mode="inference")["energy"][:, 0]
        assert_equal_outputs(energy, expected)

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
        ],
    )
    def test_weights_that_do_not_fit(self, reference, options, message):
        weights = build_theirs(reference).state_dict()
        net, energy_head, _ = build_ours(**options)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

        with pytest.raises(ValueError, match=message):
            load_reference_state_dict(weights, model=net, energy_head=energy_head)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    def test_weights_of_a_head_that_is_not_given_are_left_aside(self, reference, caplog):
        weights = build_theirs(reference, decoder="mlp").state_dict()
        net, energy_head, _ = build_ours()

        with caplog.at_level(logging.WARNING):
            load_reference_state_dict(weights, model=net, energy_head=energy_head)
        assert re.search(r"left aside: \['decoder\.model\.0\.weight'", caplog.text)

    def test_another_force_decoder(self, reference):
        weights = build_theirs(reference, decoder="mlp").state_dict()
        net, energy_head, force_head = build_ours(decoder="res")

        with pytest.raises(ValueError, match="force decoder of 3 layers, the force head has 7"):
            load_reference_state_dict(weights, model=net, energy_head=energy_head, force_head=force_head)


# --- The authors' fork of OCP has more options; weights are made up here under its names ---

C, F, G = 12, 10, 6


def fork_weights():
    """Weights of the fork's model with one block, no tags, properties, periods and groups, no norm."""
    torch.manual_seed(4)
    layers = {
        "embed_block.lin": (C, C),
        "embed_block.lin_e1": (F // 2, 3),
        "embed_block.lin_e12": (F - F // 2, G),
        "interaction_blocks.0.lin_h": (C, C),
        "output_block.lin1": (C // 2, C),
        "output_block.lin2": (1, C // 2),
    }
    weights = {"distance_expansion.offset": torch.linspace(0, 4, G), "embed_block.emb.weight": torch.randn(85, C)}
    for name, shape in layers.items():
        weights |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return weights


def build_for_fork(**options):
    sizes = {"hidden_channels": C, "num_filters": F, "num_gaussians": G, "num_interactions": 1, "cutoff": 4.0}
    bare = {"tag_hidden_channels": 0, "pg_hidden_channels": 0, "phys_embeds": False}
    switches = {"complex_mp": False, "graph_norm": False, "skip_co": False}
    heads = EnergyHead(hidden_channels=C, num_interactions=1, energy_head=False, skip_co=False)
    return FAENet(**(sizes | bare | switches | options)), heads


class MultiplyingConv(TransformerConv):
    """The fork's `base_with_att`: the edge embedding multiplies the values."""

    def message(self, query_i, key_j, value_j, edge_attr, index, ptr, size_i):
        edges = self.lin_edge(edge_attr).view(-1, self.heads, self.out_channels)
        nothing, ones = torch.zeros_like(edge_attr), torch.ones_like(value_j)
        weights = super().message(query_i, key_j, ones, nothing, index, ptr, size_i)
        return weights * value_j * edges


@pytest.mark.parametrize("kind, conv_class", [("att", TransformerConv), ("base_with_att", MultiplyingConv)])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_of_the_fork(kind, conv_class, heads, batch):
    torch.manual_seed(0)
    conv = conv_class(C, C, heads=heads, concat=False, root_weight=False, edge_dim=F)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = fork_weights()
    weights |= {f"interaction_blocks.0.lin_geom.{name}": tensor for name, tensor in conv.state_dict().items()}
    assert "interaction_blocks.0.lin_geom.lin_key.bias" in weights
    net, energy_head = build_for_fork(mp_type=kind, att_heads=heads)
    load_reference_state_dict(weights, model=net, energy_head=energy_head)

    h = net.atom_embedding(batch.atomic_numbers, None)
    e = net.edge_embedding(batch.edge_vec)
    lin_h = torch.nn.functional.linear(
        conv(h, batch.edge_index, e),
        weights["interaction_blocks.0.lin_h.weight"],
        weights["interaction_blocks.0.lin_h.bias"],
    )
    expected = h + torch.nn.functional.silu(lin_h)
    assert_equal_outputs(net(**batch.arguments).node_embedding, expected)


def test_force_decoder_of_the_fork_has_dropout_between():
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Linear(C, 7), torch.nn.BatchNorm1d(7), torch.nn.SiLU(), torch.nn.Dropout(0.1), torch.nn.Linear(7, 3)
    ).eval()
    geom = {"weight": torch.randn(C, F + 2 * C), "bias": torch.randn(C)}
    weights = fork_weights() | {f"interaction_blocks.0.lin_geom.{name}": tensor for name, tensor in geom.items()}
    weights |= {f"decoder.model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    net, energy_head = build_for_fork()
    force_head = ForceHead(hidden_channels=C, force_decoder_type="mlp", force_hidden_channels=7).eval()
    load_reference_state_dict(weights, model=net, energy_head=energy_head, force_head=force_head)

    h = torch.randn(5, C)
    torch.testing.assert_close(force_head(h), theirs(h))
