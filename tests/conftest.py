import os
import shutil
import sys
from pathlib import Path

# Where there is no GPU, Triton kernels run in Triton's interpreter; it must be known before Triton is imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
import compatibility

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are tiny

# The same cases at every run; `--hypothesis-profile=explore` looks for new ones.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, max_examples=40, **common)
settings.register_profile("explore", max_examples=400, **common)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--compatibility", metavar="FOLDER", help="write the outcomes of tests marked `compatibility` there"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", compatibility.MARKER)
    if config.getoption("--compatibility"):
        config.pluginmanager.register(compatibility.Recorder(Path(config.getoption("--compatibility"))))
