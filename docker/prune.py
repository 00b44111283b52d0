"""Makes an installation of torch smaller that will never see a GPU.

The usual index has builds of torch for GPUs only. Their libraries name most of CUDA's as needed, and do not load
without them; what is not loaded for work on a CPU goes: Triton, and of NVIDIA's packages every file that no process
maps after training a small net. A build of torch for CPUs has nothing of this, and stays as it is.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

WORK = """
import torch, torchvision
from torch.nn import BatchNorm2d, Conv2d, Flatten, Linear, Sequential
net = Sequential(Conv2d(3, 4, 3), BatchNorm2d(4), Flatten(), Linear(144, 2))
net(torch.rand(2, 3, 8, 8)).sum().backward()
torch.optim.SGD(net.parameters(), 0.1).step()
torch.linalg.svd(torch.rand(4, 4)), torch.linalg.eigh(torch.eye(4)), torch.fft.fft(torch.rand(4))
print(open("/proc/self/maps").read())
"""


def work() -> str:
    """Train a little; gives what the process had mapped."""
    return subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True).stdout


def main() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    shutil.rmtree(packages / "triton", ignore_errors=True)
    mapped = work()
    for path in (packages / "nvidia").rglob("*"):
        if path.is_file() and f"{path}\n" not in mapped:
            path.unlink()
    work()  # or the image is not made


main()
