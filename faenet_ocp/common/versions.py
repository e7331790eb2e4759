"""Versions of the packages whose change could change a result."""

import platform
from importlib.metadata import PackageNotFoundError, version


def software_versions() -> dict[str, str | None]:
    """Python and packages; None for a package that is not installed (a checkout that is only on the path)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "torch-geometric", "fairchem-core", "faenet-ocp"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
