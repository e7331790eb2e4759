"""ComENet and SphereNet, networks that look at angles and torsions."""

from typing import Any, ClassVar

from models.suite import ModelSuite


class TestComENet(ModelSuite):
    name, symmetric = "comenet", "SE"
    golden = (0.0, 0.0, 0.0, 0.0, 0.0)
    options: ClassVar[dict[str, Any]] = {
        "hidden_channels": 16,
        "middle_channels": 8,
        "num_blocks": 2,
        "num_output_layers": 2,
        "cutoff": 5.0,
    }


class TestSphereNet(ModelSuite):
    name, symmetric = "spherenet", "SE"
    golden = (0.0, 0.0, 0.0, 0.0, 0.0)
    options: ClassVar[dict[str, Any]] = {
        "hidden_channels": 12,
        "num_blocks": 2,
        "int_emb_size": 8,
        "basis_emb_size": 4,
        "out_emb_channels": 10,
    }
    options |= {"num_spherical": 3, "num_radial": 4, "num_output_layers": 1, "cutoff": 5.0}
