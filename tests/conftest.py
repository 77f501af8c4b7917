"""The scripts lie one folder up and are imported as they are."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run side by side, see pytest.ini
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks for pretrained weights gets an error at once, no download

import torch  # noqa: E402  (it reads the variables above)

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
torch.set_num_threads(1)
