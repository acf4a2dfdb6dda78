"""The suite runs several processes beside each other on few cores: one thread each, or they wait for one another. It runs on the CPU
also where there is a card, since it holds bits; `-m gpu` runs what needs the card."""

import os

from hypothesis import HealthCheck, settings

# A machine that does other things besides is slow, and that is no fault of what is tested.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_configure(config):
    if "gpu" not in config.option.markexpr or "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
