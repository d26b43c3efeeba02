"""The floor of the link: round trips of a mirrored write's bytes, and a stream, over loopback."""

import mmap
import os
import socket
import statistics
import threading
import time


def receive(connection, buffer):
    view = memoryview(buffer)
    while len(view):
        count = connection.recv_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True


def pair():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    for end in (client, server):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server


def round_trip_us(size=4096, seconds=1.0):
    """Median of: `size` bytes there, 16 bytes back. The other end is a process of its own."""
    client, server = pair()
    child = os.fork()
    if child == 0:
        client.close()
        buffer = bytearray(size)
        while receive(server, buffer):
            server.sendall(bytes(16))
        os._exit(0)
    server.close()
    data, answer, times = bytes(size), bytearray(16), []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        client.sendall(data)
        receive(client, answer)
        times.append(time.perf_counter() - begin)
    client.close()
    os.waitpid(child, 0)
    return statistics.median(times) * 1e6


def copy_file(source, target, size, piece=1 << 20):
    """A raw copy over the link: read a piece, send it, write it at the other end; MiB/s.

    Direct I/O and a flush at the end, as a copy of a disk's content to another machine would be made by hand.
    """
    client, server = pair()

    def store():
        buffer = mmap.mmap(-1, piece)
        file = os.open(target, os.O_RDWR | os.O_DIRECT)
        at = 0
        while at < size and receive(server, buffer):
            os.pwrite(file, buffer, at)
            at += piece
        os.fsync(file)
        os.close(file)
        server.sendall(b"done")

    writer = threading.Thread(target=store)
    began = time.perf_counter()
    writer.start()
    buffer = mmap.mmap(-1, piece)
    file = os.open(source, os.O_RDONLY | os.O_DIRECT)
    for at in range(0, size, piece):
        os.preadv(file, [buffer], at)
        client.sendall(buffer)
    os.close(file)
    receive(client, bytearray(4))
    seconds = time.perf_counter() - began
    writer.join()
    client.close()
    server.close()
    return size / seconds / (1 << 20)
