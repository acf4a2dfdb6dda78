"""What tests of runs share."""

import pytest
import torch


@pytest.fixture
def any_order():
    """torch's flags as they were, after the test: a deterministic run leaves its own."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.enable_mem_efficient_sdp(True)
