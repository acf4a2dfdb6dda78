"""What other tools' own code makes of our files: kept, and made again where a checkout is named."""

import json
import os
from pathlib import Path

import pytest

from tools import lora_readers

CHECKOUTS = {
    "kohya-ss/sd-scripts": "DIFFALIGN_SD_SCRIPTS",
    "lllyasviel/stable-diffusion-webui-forge": "DIFFALIGN_FORGE",
}
# Sums of up to four products in float32, in another order.
APART = 1e-6


def right(repository, found):
    assert found.keys() == lora_readers.REPOSITORIES[repository][0].keys()
    for name, row in found.items():
        assert row["layers"] >= 16 and not row["left over"] and not row.get("not read by us"), name
        assert row.get("apart", 0.0) < APART, name


@pytest.mark.parametrize("repository", CHECKOUTS)
def test_what_was_found_is_that_all_is_read_as_it_was_written(repository):
    kept = json.loads(lora_readers.KEPT.read_text())[repository]
    assert len(kept["commit"]) == 40 and kept["files"].keys() == set(lora_readers.REPOSITORIES[repository][1])
    right(repository, kept["found"])


@pytest.mark.slow
@pytest.mark.parametrize("repository", CHECKOUTS)
def test_their_code_reads_our_files(repository):
    if not (place := os.environ.get(CHECKOUTS[repository])):
        pytest.skip(f"{CHECKOUTS[repository]} names no checkout of {repository}")
    if "sd-scripts" in repository:
        pytest.importorskip("einops", reason="sd-scripts needs it, and toml")
    right(repository, lora_readers.main(repository, Path(place))["found"])
