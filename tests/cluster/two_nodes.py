"""A Ray cluster of two nodes with a job server, on this machine.

A program of its own, so that what it needs in its environment (the token, the path of Python) is Ray's from the start. Prints
one line of JSON when it is up, ends with its standard input.
"""

from __future__ import annotations

import json
import sys

import ray._private.utils
from ray.cluster_utils import Cluster


def main(directory: str) -> None:
    """``directory``: for Ray's session files; short, because sockets go there."""
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "temp_dir": directory})
    try:
        # Jobs find their cluster by this file, whatever else runs on this machine.
        ray._private.utils.write_ray_address(cluster.address, directory)
        cluster.add_node(num_cpus=1, temp_dir=directory)
        cluster.wait_for_nodes()
        print(json.dumps({"dashboard": f"http://{cluster.webui_url}"}), flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
