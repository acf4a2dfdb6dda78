"""What kohya's own code makes of our files: kept, and made again where a checkout is named."""

import json
import os
from pathlib import Path

import pytest

from tools import lora_readers

CHECKOUT = os.environ.get("DIFFALIGN_SD_SCRIPTS", "")
# Sums of up to four products in float32, in another order.
APART = 1e-6


def right(found):
    assert found.keys() == lora_readers.READINGS.keys()
    for name, row in found.items():
        assert row["layers"] >= 20 and not row["left over"] and not row.get("not read by us"), name
        assert row.get("apart", 0.0) < APART, name


def test_what_was_found_is_that_all_is_read_as_it_was_written():
    kept = json.loads(lora_readers.KEPT.read_text())
    assert len(kept["commit"]) == 40 and kept["files"].keys() == set(lora_readers.FILES)
    right(kept["found"])


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUT, reason="DIFFALIGN_SD_SCRIPTS names no checkout of kohya-ss/sd-scripts")
def test_sd_scripts_reads_our_files():
    pytest.importorskip("einops", reason="sd-scripts needs it, and toml")
    right(lora_readers.main(Path(CHECKOUT))["found"])
