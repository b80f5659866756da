"""How a cluster is divided among actors: no actor may want more than a node has, or it would wait for ever."""

from __future__ import annotations

import pytest

from graphkd.errors import ConfigError
from pipeline.core.ray_share import Share, divide_cluster

BOX = {"CPU": 32.0, "GPU": 8.0}


def test_cpus_are_shared_out_by_nodes() -> None:
    assert divide_cluster([{"CPU": 32.0}], 100) == Share(actors=8, threads=4, gpus=0)
    assert divide_cluster([{"CPU": 2.0}], 100) == Share(actors=1, threads=2, gpus=0)
    assert divide_cluster([{"CPU": 32.0}], 3).actors == 3
    assert divide_cluster([{"CPU": 16.0}] * 4, 100, actors=1) == Share(actors=1, threads=16, gpus=0)
    assert divide_cluster([{"CPU": 16.0}] * 4, 100) == Share(actors=16, threads=4, gpus=0)
    assert divide_cluster([{"CPU": 2.0}] * 3, 100) == Share(actors=3, threads=2, gpus=0)
    with pytest.raises(ConfigError, match=r"engine\.threads 24 is more than the 16 CPUs of the largest node"):
        divide_cluster([{"CPU": 16.0}] * 4, 100, threads=24)


def test_gpus_have_an_actor_each_unless_the_cpu_is_asked_for() -> None:
    assert divide_cluster([BOX], 100, device="cpu").gpus == 0
    assert divide_cluster([BOX], 100) == Share(actors=8, threads=4, gpus=1)
    assert divide_cluster([{"CPU": 8.0}, BOX, BOX], 100) == Share(actors=16, threads=4, gpus=1)
    assert divide_cluster([BOX], 100, actors=3).actors == 3
    assert Share(actors=8, threads=4, gpus=1).cpus == 1
