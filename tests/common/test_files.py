"""Files and folders that are whole or not there."""

from pathlib import Path

import pytest

from faenet_ocp.common import files


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    """Leftovers go, nothing stays beside it, and a second process is told of the first."""
    root = tmp_path / "new" / "data"
    (tmp_path / "new" / ".data.unfinished").mkdir(parents=True)
    (tmp_path / "new" / ".data.unfinished" / "old").touch()
    with files.made_whole(root) as folder:
        (folder / "file").touch()
        with pytest.raises(ValueError, match="another process is writing there"), files.made_whole(root):
            pass
        assert not root.exists()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "new",
        "new/data",
        "new/data/file",
    ]
