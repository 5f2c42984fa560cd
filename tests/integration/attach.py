"""The attach socket, packet by packet."""

import array
import fcntl
import os
import select
import socket
import struct
import tempfile

from daemon import bound
from wire import v1

MAX_PACKET_BYTES = 4096


def lifeline():
    """A file that this process holds a write record lock on: proof of life for kernels without
    SO_PEERPIDFD. Keep it open."""
    file = tempfile.TemporaryFile()
    fcntl.fcntl(file, fcntl.F_SETLK,
                struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return file


class AttachSocket:
    """A connection. receive() gives (event, descriptor or None), or None at the end."""

    def __init__(self, path, timeout=bound(20)):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.lifeline = lifeline()

    def send_bytes(self, data, descriptors=()):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self.socket.sendmsg([data], rights if descriptors else [])

    def send(self, **request):
        self.send_bytes(v1.AttachRequest(**request).SerializeToString())

    def hello(self, token, boot_epoch):
        request = v1.AttachRequest(
            hello=v1.AttachHello(session_token=token, boot_epoch=boot_epoch))
        self.send_bytes(request.SerializeToString(), [self.lifeline.fileno()])

    def receive(self):
        size = array.array("i").itemsize
        data, ancillary, flags, _ = self.socket.recvmsg(
            MAX_PACKET_BYTES, socket.CMSG_SPACE(4 * size), socket.MSG_CMSG_CLOEXEC)
        if not data:
            return None
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "a packet was cut"
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(content[:len(content) // size * size])
        assert len(descriptors) <= 1, "more than one descriptor"
        event = v1.AttachEvent.FromString(data)
        return event, descriptors[0] if descriptors else None

    def expect_rejected(self):
        """(gRPC code, message) of the Rejected that must be next, with the end after it."""
        packet = self.receive()
        assert packet is not None, "closed without Rejected"
        assert packet[0].WhichOneof("event") == "rejected", packet[0]
        assert self.receive() is None, "open after Rejected"
        return packet[0].rejected.code, packet[0].rejected.message

    def is_closed(self, seconds=5):
        """True if the daemon closes within that time; what comes before is dropped."""
        while select.select([self.socket], [], [], seconds)[0]:
            try:
                packet = self.receive()
            except ConnectionResetError:
                return True
            if packet is None:
                return True
            if packet[1] is not None:
                os.close(packet[1])
        return False

    def close(self):
        self.socket.close()
        self.lifeline.close()
