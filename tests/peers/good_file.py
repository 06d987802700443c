"""A launch file that is good, of the first of two machines with one CPU process each."""

from __future__ import annotations

GOOD = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "use_cpu": True,
    "num_machines": 2,
    "num_processes": 2,
    "machine_rank": 0,
    "main_process_ip": "10.0.0.1",
    "main_process_port": 29500,
    "mixed_precision": "no",
}
