"""scripts/compare_losses.py tells checkouts that train alike from those that do not."""

import subprocess
import sys
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).resolve().parents[2]
_OTHER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from faenet_ocp.launch.cli import main
sys.exit(main([*sys.argv[1:], "--seed", "1"]))
"""


@pytest.mark.slow
def test_only_equal_trainings_are_equal(tmp_path: Path) -> None:
    config = processes.write_config(tmp_path / "config.yml", processes.write_data(tmp_path))
    (tmp_path / "main.py").write_text(_OTHER)
    for other, words, status in ((ROOT, "equal to the last bit", 0), (tmp_path, "numbers differ\nfirst: step 1:", 1)):
        command = [sys.executable, str(ROOT / "scripts/compare_losses.py"), str(ROOT), str(other)]
        done = subprocess.run([*command, "--config", str(config), "--steps", "2"], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert words in done.stdout
