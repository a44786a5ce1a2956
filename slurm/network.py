"""Which network interface leads to another node: ask the kernel, as names may resolve nowhere."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def own_address_towards(address: str) -> str | None:
    """Return this node's IPv4 address that packets to `address` come from; None if unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
            own: str = probe.getsockname()[0]
        except OSError:
            return None
    return own


def interface_towards(address: str) -> str | None:
    """Return the name of the interface that packets to `address` leave by; None if unknown."""
    own = own_address_towards(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
            except OSError:  # an interface without IPv4 address
                continue
            if socket.inet_ntoa(found) == own:
                return name
    return None


def choose_gloo_interface(address: str) -> None:
    """Set GLOO_SOCKET_IFNAME where the user has not.

    Gloo binds to what the own host name resolves to, else to the loopback, and then waits for its
    peers for ever. NCCL looks for its interfaces itself (NCCL_SOCKET_IFNAME says otherwise).
    """
    name = interface_towards(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
