"""Ray nodes on one machine, for what is to survive their loss: a head, and one for each part."""

import signal
from dataclasses import dataclass, field
from typing import Any

import psutil
from ray.cluster_utils import Cluster

PARTS = ("inference", "learner", "rollouts")
"""Each has a node of its own, labelled with its name."""


@dataclass
class Nodes:
    """A head, where the job is started, and a node for each part; one that is lost is replaced."""

    cluster: Cluster
    parts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls) -> "Nodes":
        """The head and the nodes of all parts."""
        nodes = cls(Cluster(initialize_head=True, head_node_args={"num_cpus": 1}))
        for part in PARTS:
            nodes.join(part)
        return nodes

    @property
    def settings(self) -> list[str]:
        """What a job is told to run here, each part on its node."""
        labels = [f"++{part}.node_labels={{part: {part}}}" for part in PARTS]
        return [f"cluster.address={self.cluster.address}", *labels, "rollouts.num_cpus=1"]

    def join(self, part: str) -> None:
        """Another node for a part, as an autoscaler would bring it."""
        self.parts[part] = self.cluster.add_node(num_cpus=1, labels={"part": part})

    def lose(self, part: str) -> None:
        """The part's node is gone at once, with all that runs there."""
        self.cluster.remove_node(self.parts[part], allow_graceful=False)

    def kill(self, name: str) -> int:
        """Kills the processes of these nodes that are called so; returns how many there were."""
        killed = 0
        for node in self.cluster.list_all_nodes():
            raylet = node.all_processes["raylet"][0].process.pid
            for one in psutil.Process(raylet).children(recursive=True):
                try:
                    if " ".join(one.cmdline()).startswith(name):
                        one.send_signal(signal.SIGKILL)
                        killed += 1
                except psutil.NoSuchProcess:
                    continue  # An agent that has just ended.
        return killed

    def close(self) -> None:
        """Stops all nodes."""
        self.cluster.shutdown()
