"""What of `training.distributed` knows Ray: Ray Train starts the processes, on a Ray of their own or on a cluster.

Runs in the environment `ray`. Without RAY_ADDRESS, it is a Ray that listens on loopback only, lets nobody else in, and
is gone when the processes are. With it, it is the cluster named: its nodes need the same environment, and must see the
recipe's data and the run's folder under the same paths.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from training.distributed import STUCK_S_MAX, learn

EVERYWHERE = MappingProxyType(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(STUCK_S_MAX),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
)
ALONE = MappingProxyType(
    {
        # It is what keeps Ray to loopback, on Linux too. `_node_ip_address="127.0.0.1"` becomes the host's own address,
        # and with any other of loopback it listens everywhere.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_AUTH_MODE": "token",
    }
)
SENT = ("HEADRACE_DATA", "HF_HUB_OFFLINE")
"""What a process on another machine needs of our environment, in which there may be keys."""
TOLD = "ERROR"
"""Of what Ray itself says; without its dashboard it would warn of that twice a second."""
OBJECTS_BYTES = 100 << 20
"""What Ray keeps in shared memory; nothing of ours goes there."""


def main(folder: Path, workers: int) -> None:
    """Have that many processes learn. Fails if one of them does; who asked for this starts it again."""
    os.environ.update(EVERYWHERE)  # before Ray is imported, which reads them then
    with _cluster(workers):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        TorchTrainer(
            _learn,
            train_loop_config={
                "folder": str(folder),
                "where": str(Path.cwd()),
                "environment": {name: os.environ[name] for name in SENT if name in os.environ},
            },
            torch_config=TorchConfig(backend="gloo", timeout_s=int(STUCK_S_MAX)),
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(
                name="ray", storage_path=str(folder), failure_config=FailureConfig(controller_failure_limit=0)
            ),
        ).fit()


@contextmanager
def _cluster(workers: int) -> Iterator[None]:
    if "RAY_ADDRESS" in os.environ:
        import ray

        with ray.init(logging_config=ray.LoggingConfig(log_level=TOLD)):
            yield
        return
    os.environ.update(ALONE, RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    with (
        tempfile.TemporaryDirectory(prefix="headrace-ray-") as scratch,
        ray.init(
            address="local",
            num_cpus=workers,  # more of them than cores is slow, and no reason to wait for ever
            include_dashboard=False,
            logging_config=ray.LoggingConfig(log_level=TOLD),
            object_store_memory=OBJECTS_BYTES,
            _temp_dir=scratch,
        ),
    ):
        yield


def _learn(given: Mapping[str, Any]) -> None:
    """In a process of Ray's, which knows nothing of where it was asked for."""
    os.chdir(given["where"])
    os.environ.update(given["environment"])
    learn(Path(given["folder"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
