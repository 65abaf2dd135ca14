"""Joins torch.distributed's default group: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from tidewright.distributed.group import TensorParallelGroup
from tidewright.distributed.shared_memory import SharedMemory


def make_store(host: str, timeout: float) -> dist.TCPStore:
    """The store through which the ranks find each other, on a free port of `host` and of no other address."""
    listener = socket.create_server((host, 0), backlog=64)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        use_libuv=False,
        timeout=timedelta(seconds=timeout),
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, timeout: float) -> dist.TCPStore:
    return dist.TCPStore(
        host, port, is_master=False, use_libuv=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )


def join_group(
    store: dist.Store,
    rank: int,
    size: int,
    device: str,
    own_address: str,
    timeout: float,
    shared_file: int | None,
) -> TensorParallelGroup:
    """Returns when all ranks have joined.

    Args:
        device: this rank's: "cpu", or "cuda:N", which must be CUDA's current one.
        shared_file: descriptor of memory that all ranks share, if they are on one host.
        own_address: of this host, as the other ranks reach it.
        timeout: seconds after which a collective that does not come to its end fails.
    """
    if interface := _interface_of(own_address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    gpu = torch.device(device) if device.startswith("cuda") else None
    group = TensorParallelGroup(rank, size, store=store)
    group.wait_for_all()  # from here on, one that does not come within `timeout` is lost
    # NCCL connects at once if it is told the GPU, so that a fault shows here and not in the first step.
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=gpu,
    )
    shared = None
    if not gpu and shared_file is not None:
        shared = SharedMemory.attach(shared_file, rank, size, timeout)
    # All or none, or they would wait for each other in different places.
    return replace(group, shared=shared) if group.smallest(int(shared is not None)) else group


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            return name
    return None
