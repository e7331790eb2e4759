"""Frames of frame averaging: principal axes and their signs (`compute`), rings where two axes are equal (`rings`).

`rotations` applies and draws rotations, `report` names the systems whose frames are not unique.
Everything public is here.
"""

from faenet_ocp.frames.compute import (
    GROUPS,
    METHODS,
    TIE,
    centroids,
    compute_frames,
    flatten_frames,
    frame_sizes,
    num_frames,
    pad_frames,
)
from faenet_ocp.frames.report import FrameReport, frame_report
from faenet_ocp.frames.rotations import DIMS, Frames, Generators, Views, random_rotations, rotate, rotate_back

__all__ = [
    "DIMS",
    "GROUPS",
    "METHODS",
    "TIE",
    "FrameReport",
    "Frames",
    "Generators",
    "Views",
    "centroids",
    "compute_frames",
    "flatten_frames",
    "frame_report",
    "frame_sizes",
    "num_frames",
    "pad_frames",
    "random_rotations",
    "rotate",
    "rotate_back",
]
