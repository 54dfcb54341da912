"""Two fake CPU devices, shapes checked against their annotations, a float64 switch; quick to compile, and only once.

With JAX_PLATFORMS=cuda,cpu (or tpu,cpu) the tests of the numerical modules run on an accelerator: see CONTRIBUTING.md.
"""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

COMPILED = "JAX_COMPILATION_CACHE_DIR"
if COMPILED not in os.environ:  # workers, and the processes that tests start, inherit it
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, os.environ[COMPILED], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":  # more than half of the suite's time was compilation of small programs
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones abort: it is unknown
    flags = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
os.environ["HF_HUB_OFFLINE"] = "1"
gc.set_threshold(200_000, 50, 100)  # a quarter of the suite's time was a search for cycles in all that JAX has traced

import inspect  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from beartype import beartype  # noqa: E402
from jaxtyping import jaxtyped  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from sae_jax.config import base  # noqa: E402
from sae_jax.reports import figures  # noqa: E402
from sae_jax.training import run as run_lib  # noqa: E402

NUMERIC = (
    "autoencoder.balance", "autoencoder.death", "autoencoder.kept", "autoencoder.objective", "autoencoder.optimizer",
    "autoencoder.sae", "autoencoder.threshold", "autoencoder.topk", "outliers.moments", "activations.synthetic",
    "training.recovery", "training.fates", "training.step", "training.evaluation",
)  # fmt: skip


def check_shapes(name: str) -> None:
    """The functions of a module check their arguments against their annotations.

    Not those within them, as an import hook does: they are made anew at every call, and a fifth of the time of a small
    run went into decorating them.
    """
    module = importlib.import_module(f"sae_jax.{name}")
    for key, function in list(vars(module).items()):
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            setattr(module, key, jaxtyped(function, typechecker=beartype))


for name in NUMERIC:
    check_shapes(name)

FULL_DPI = figures.STYLE["figure.dpi"]
figures.STYLE["figure.dpi"] = 40


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One more than cores: tests also wait, for the processes that they have started."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def enough_devices(request):
    """On one accelerator what is marked `two_devices` is skipped, on a GPU what is marked `repeats`."""
    if request.node.get_closest_marker("two_devices") and jax.device_count() < 2:
        pytest.skip("one device alone")
    if request.node.get_closest_marker("repeats") and jax.default_backend() == "gpu":
        pytest.skip("its atomics add in any order")


@pytest.fixture(autouse=True)
def undrawn(request):
    """Half the time of a run this small goes into its figures and its page: the mark `drawn` asks for them.

    What fixtures of modules run, and what runs in processes of its own, is drawn.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("drawn"):
            patch.setattr(run_lib.Run, "_draw", lambda *_: None)
        yield


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
