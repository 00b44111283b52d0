"""One thread in every test: results do not depend on the machine's cores, and the suite shares them fairly."""

import torch

torch.set_num_threads(1)
