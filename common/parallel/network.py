"""Which network interface gloo uses, on machines whose own name leads nowhere.

Gloo offers the other ranks the address that the machine's host name resolves to. With a line such as
`127.0.1.1 hostname` in /etc/hosts, which Debian and Ubuntu write, or in a container that shares its machine's network,
that is a loopback address, and ranks on other machines cannot connect.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

from common.system.environment import Process

# A documentation address (RFC 5737): it exists nowhere, so the way to it is the default route.
_ELSEWHERE = "192.0.2.1"
_SIOCGIFADDR = 0x8915


def choose_interface(at: Process) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface on the way to MASTER_ADDR, unless it is set or all ranks are here."""
    if at.world_size == at.local_world_size or os.environ.get("GLOO_SOCKET_IFNAME") or sys.platform != "linux":
        return
    master = os.environ.get("MASTER_ADDR", "")
    # On the machine with rank 0 its own name may be a loopback name too.
    name = interface_towards(master) or (None if _is_local(master) else interface_towards(_ELSEWHERE))
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _is_local(address: str) -> bool:
    """Whether it says loopback literally, which is how ranks on one machine are started as if they were on several."""
    return address in ("", "localhost", "::1") or address.startswith("127.")


def interface_towards(address: str) -> str | None:
    """The interface with the IPv4 address from which packets to `address` leave; None for loopback and no route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # chooses a route; nothing is sent
            own = probe.getsockname()[0]
            return next((n for _, n in socket.if_nameindex() if n != "lo" and _address(probe, n) == own), None)
    except OSError:
        return None


def _address(probe: socket.socket, interface: str) -> str | None:
    import fcntl

    try:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return None  # an interface without an IPv4 address
    return socket.inet_ntoa(answer[20:24])
