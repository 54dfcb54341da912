"""Two fake CPU devices, shapes checked against their annotations, and a float64 switch."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

NUMERIC = ("sae", "topk", "objective", "death", "outliers", "synthetic", "recovery", "fates", "training", "evaluation")
install_import_hook([f"sae_jax.{name}" for name in NUMERIC], "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from sae_jax.config import base  # noqa: E402


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tiny() -> ConfigDict:
    """A run of a few seconds: sparse synthetic data, two members."""
    config = base()
    config.sae.n_features, config.sae.k = 64, 4
    config.data.signal, config.data.gamma, config.data.d_model = "sparse", 4.0, 16
    config.data.n_true_features, config.data.n_active, config.data.statistics_tokens = 32, 3, 2000
    config.train.steps, config.train.batch_size, config.train.learning_rate = 40, 32, 1e-3
    config.train.steps_per_dispatch, config.train.devices = 4, 1
    config.eval.n_tokens, config.eval.batch_size = 500, 200
    config.checkpoint.every = 10
    config.members = ConfigDict({
        "baseline": {"sae": {"center": "none"}},
        "centred": {"sae": {"center": "geometric_median"}},
    })
    return config
