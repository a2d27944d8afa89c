"""Which network interface has an address: libraries that ranks meet through want its name."""

import socket
import struct
import sys

__all__ = ["interface_of"]

#: Linux's request for an interface's address (netdevice(7)), and where in the answer it stands.
_SIOCGIFADDR, _AT = 0x8915, slice(20, 24)


def interface_of(address: str) -> str | None:
    """By its IPv4 address; None where none has it, or the system is not known."""
    if not sys.platform.startswith("linux"):
        return None
    return next((name for _, name in socket.if_nameindex() if _address(name) == address), None)


def _address(name: str) -> str | None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[_AT])
