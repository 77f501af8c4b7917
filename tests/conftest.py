"""One thread for each of the two test processes, and no network. The marker `slow` is in pytest.ini."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # who asks for pretrained weights gets an error at once

import torch  # noqa: E402  (it reads the variables above)

torch.set_num_threads(1)
