"""What stands beside our mirror in a comparison: QEMU's quorum, nbdkit, and the floor."""

import os
import socket
import subprocess
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_port(port, process):
    for _ in range(400):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit(f"scripts/bench: {process.args[0]} does not listen on port {port}")


def make_image(path, size):
    """A file whose every block has been written: none of its extents has still to be converted."""
    subprocess.run(["fio", "--name=fill", f"--filename={path}", f"--size={size}", "--rw=write", "--bs=1m",
                    "--direct=1", "--ioengine=psync", "--end_fsync=1", "--output=/dev/null"], check=True)


class System:
    """Something that fio can be pointed at, and the processes that serve it."""

    name = ""
    # Its threads live as long as it does: what /proc says of them covers all that they did.
    lasting_threads = True

    def __init__(self):
        self.processes = []

    def start(self, *command, **options):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **options)
        self.processes.append(process)
        return process

    def pids(self):
        return [process.pid for process in self.processes]

    def stop(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait()

    def targets(self):
        """fio options, for each of the jobs that have to run at the same time."""
        raise NotImplementedError


class Quorum(System):
    """QEMU writing to a file and, over NBD, to a second daemon's file; Nagle's algorithm off."""

    name = "qemu-quorum"

    def __init__(self, place, size):
        super().__init__()
        files = [os.path.join(place, f"quorum.{side}") for side in "ab"]
        for file in files:
            make_image(file, size)
        shim = os.path.join(place, "nodelay.so")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", os.path.join(HERE, "nodelay.c"), "-o", shim, "-ldl"],
                       check=True)
        environment = {**os.environ, "LD_PRELOAD": shim}
        self.port, partner = free_port(), free_port()

        def blockdev(file):
            return f"driver=file,node-name=f,filename={file},aio=native,cache.direct=on"

        def server(port):
            return f"addr.type=inet,addr.host=127.0.0.1,addr.port={port},max-connections=16"

        wait_port(partner, self.start(
            "qemu-storage-daemon", "--blockdev", blockdev(files[1]), "--nbd-server", server(partner),
            "--export", "type=nbd,id=e,node-name=f,name=disk,writable=on", env=environment))
        wait_port(self.port, self.start(
            "qemu-storage-daemon", "--blockdev", blockdev(files[0]),
            "--blockdev", "driver=nbd,node-name=r,server.type=inet,server.host=127.0.0.1,"
                          f"server.port={partner},export=disk",
            "--blockdev", "driver=quorum,node-name=q,vote-threshold=1,read-pattern=fifo,"
                          "children.0=f,children.1=r",
            "--nbd-server", server(self.port),
            "--export", "type=nbd,id=e,node-name=q,name=disk,writable=on", env=environment))

    def targets(self):
        return [["--ioengine=nbd", f"--uri=nbd://127.0.0.1:{self.port}/disk"]]


class Nbdkit(System):
    """One copy in nbdkit's own memory, no mirror: the floor of an NBD server."""

    name = "nbdkit"
    # One for each connection.
    lasting_threads = False

    def __init__(self, _place, size):
        super().__init__()
        self.port = free_port()
        wait_port(self.port, self.start("nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port",
                                        str(self.port), "--exportname", "disk", "memory", str(size)))

    def targets(self):
        return [["--ioengine=nbd", f"--uri=nbd://127.0.0.1:{self.port}/disk"]]


class Raw(System):
    """Two files written at the same time by fio itself: no server, no network."""

    name = "raw"

    def __init__(self, place, size):
        super().__init__()
        self.files = [os.path.join(place, f"raw.{side}") for side in "ab"]
        for file in self.files:
            make_image(file, size)

    def targets(self):
        return [["--ioengine=libaio", "--direct=1", f"--filename={file}"] for file in self.files]
