"""Where processes of this host meet before they form a group."""

from __future__ import annotations

from datetime import timedelta
from socket import create_server

from torch.distributed import TCPStore


def open_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """One that this process keeps for others, at that address alone: what torch opens by itself listens to the whole network.
    Port 0: any that is free."""
    listener = create_server((host, port))
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )
