"""The scripts lie one folder up and are imported as they are."""
import os
import signal
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks for pretrained weights gets an error at once, not a download
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
torch.set_num_threads(2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored, and the scripts that tests start would inherit that

import train_cifar  # noqa: E402  (found through sys.path)
import train_imagenet  # noqa: E402

