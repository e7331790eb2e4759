"""`python main.py --config configs/is2re/faenet.yml`: the same as the console command `faenet-ocp`."""

import sys

from faenet_ocp.launch.entry import main

if __name__ == "__main__":
    sys.exit(main())
