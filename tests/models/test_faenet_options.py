"""What the network accepts: elements, tags and options; what it says of the others."""

import io

import ase
import pytest
import torch

from faenet_ocp.models.base import check_elements
from faenet_ocp.models.faenet import FAENet
from faenet_ocp.models.heads import EnergyHead, ForceHead
from network_inputs import SMALL, build, energies, make_inputs, slabs


@pytest.mark.parametrize("number", [0, 119, -1])
def test_elements_outside_the_table_are_named(number):
    inputs = make_inputs(slabs(1))
    inputs.atomic_numbers[3] = number
    with pytest.raises(ValueError, match=f"no trained embedding for element {number}$"):
        energies(build(), inputs)


def test_all_elements_up_to_118_have_embeddings():
    inputs = make_inputs([ase.Atoms([number]) for number in range(1, 119)])
    embedding = build()[0](**inputs.arguments).node_embedding
    assert embedding.isfinite().all() and len(embedding.unique(dim=0)) == 118


def test_elements_marked_as_untrained_stay_so_when_saved():
    net = build()[0]
    net.atom_embedding.known_elements[[79, 92]] = False
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    loaded = build(seed=5)[0]
    loaded.load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(ValueError, match=r"element 79 \(Au\), element 92 \(U\)$"):
        check_elements(torch.tensor([92, 1, 79, 79]), loaded.atom_embedding.known_elements)


def test_on_other_devices_the_device_looks_at_the_elements():
    check_elements(torch.ones(3, dtype=torch.long, device="meta"), torch.ones(119, dtype=torch.bool, device="meta"))


def test_missing_tags():
    arguments = make_inputs(slabs(1)).arguments | {"tags": None}
    with pytest.raises(ValueError, match=r"tags: .*tag_hidden_channels"):
        build()[0](**arguments)
    build(tag_hidden_channels=0)[0](**arguments)


@pytest.mark.parametrize(
    "part, options, message",
    [
        (FAENet, {"mp_type": "updown_scale"}, r"mp_type: 'updown_scale' .*base, simple, .*did you mean 'updownscale'"),
        (FAENet, {"mp_type": None}, "mp_type: None"),
        (FAENet, {"edge_embed_type": "all_rj"}, "edge_embed_type: 'all_rj' .*did you mean 'all_rij'"),
        (FAENet, {"graph_norm": "sistem"}, "graph_norm: 'sistem' .*system, batch, none; did you mean 'system'"),
        (FAENet, {"skip_co": "concat_atoms"}, "skip_co: 'concat_atoms' .*did you mean 'concat_atom'"),
        (FAENet, {"skip_co": True}, "skip_co: True"),
        (FAENet, {"act": "swich"}, "act: 'swich' .*did you mean 'swish'"),
        (FAENet, {"hidden_channels": 0}, "hidden_channels: 0 is not a whole number of at least 1"),
        (FAENet, {"num_interactions": 2.0}, "num_interactions: 2.0"),
        (FAENet, {"num_gaussians": 1}, "num_gaussians: 1 .*at least 2"),
        (FAENet, {"tag_hidden_channels": -1}, "tag_hidden_channels: -1"),
        (FAENet, {"att_heads": 0}, "att_heads: 0"),
        (FAENet, {"cutoff": 0.0}, "cutoff: 0.0"),
        (FAENet, {"cutoff": "6"}, "cutoff: '6'"),
        (FAENet, {"complex_mp": "no"}, "complex_mp: 'no' is not true or false"),
        (FAENet, SMALL | {"hidden_channels": 26}, "hidden_channels: 26 leaves no channel.*take 26"),
        (EnergyHead, {"energy_head": "weighted-av-final-embed"}, "did you mean 'weighted-av-final-embeds'"),
        (EnergyHead, {"skip_co": "cat"}, "skip_co: 'cat'"),
        (EnergyHead, {"act": 3}, "act: 3"),
        (ForceHead, {"force_decoder_type": "res_updwn"}, "force_decoder_type: .*did you mean 'res_updown'"),
        (ForceHead, {"force_norm": "batch"}, "force_norm: 'batch' .*did you mean 'batch1d'"),
        (ForceHead, {"force_hidden_channels": 0}, "force_hidden_channels: 0"),
    ],
)
def test_wrong_options(part, options, message):
    with pytest.raises(ValueError, match=message):
        part(**options)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="num_filter"):
        FAENet(num_filter=3)


def test_options_can_be_switched_off_and_on_as_in_ocp():
    assert build(graph_norm=True)[0].options.graph_norm == "system"
    assert build(graph_norm=False)[0].options.graph_norm == "none"
    for off in (False, None, ""):
        head = EnergyHead(energy_head=off, skip_co=off).options
        assert (head.energy_head, head.skip_co) == ("sum", "none")
        assert build(skip_co=off)[0].lin_skip is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"att_heads": 2}, "att_heads: 2 has no effect"),
        ({"mp_type": "basic"}, "num_filters: 24 has no effect"),
        ({"phys_embeds": False, "phys_hidden_channels": 4}, "phys_hidden_channels: 4 has no effect"),
    ],
)
def test_options_without_effect_are_warned_of(options, message):
    with pytest.warns(UserWarning, match=message):
        FAENet(**(SMALL | options))
