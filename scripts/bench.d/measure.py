"""The measurements of scripts/bench."""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time

DEVICE = "n1-d1"


class Playground:
    """Two nodes on this machine, for as long as the block lasts."""

    def __init__(self, parent, size):
        self.parent, self.size = parent, size

    def __enter__(self):
        self.dir = tempfile.TemporaryDirectory(dir=self.parent, prefix="ublk-mirror-bench-")
        self.play = os.path.join(self.dir.name, "play")
        self.process = subprocess.Popen(
            ["mirrorctl", "playground", "--json", "--frontend", "nbd", "--nodes", "2",
             "--disk-size", self.size, "--dir", self.play],
            stdout=subprocess.PIPE)
        self.wait(lambda status: status is not None and status["verdict"] == "healthy")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.dir.cleanup()

    def run(self, *arguments):
        return subprocess.run(["mirrorctl", *arguments, "--dir", self.play], capture_output=True, text=True)

    def status(self):
        answer = self.run("status", "--json")
        return json.loads(answer.stdout) if answer.returncode <= 2 and answer.stdout else None

    def wait(self, well, patience=60.0):
        end = time.monotonic() + patience
        while time.monotonic() < end:
            status = self.status()
            if well(status):
                return status
            time.sleep(0.05)
        raise SystemExit(f"scripts/bench: not reached within {patience:.0f} s: {self.status()}")

    def uri(self):
        device = next(device for device in self.status()["devices"] if device["name"] == DEVICE)
        return device["uri"]

    def fio(self, *options, wait=True):
        command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={self.uri()}", "--output-format=json",
                   *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return finish(process) if wait else process


def finish(process):
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit("scripts/bench: fio failed")
    return json.loads(output[output.index("{"):])["jobs"][0]


def intents(play_in, rounds):
    """Pairs of passes on fresh clusters: a cold region needs its dirty bit on the disk first."""
    results = {"cold": [], "warm": []}
    for _ in range(rounds):
        with Playground(play_in, "24G") as play:
            for name in results:
                job = play.fio("--rw=randwrite", "--bs=4k", "--blockalign=1m", "--iodepth=32", "--size=10G",
                               "--randseed=1")
                results[name].append(job["write"]["iops"])
    cold, warm = (statistics.median(results[name]) for name in ("cold", "warm"))
    ratios = [a / b for a, b in zip(results["cold"], results["warm"])]
    yield "4k random writes, QD32, warm", warm, "IOPS"
    yield "4k random writes, QD32, every region new", cold, "IOPS"
    yield "cold beside warm", statistics.median(ratios), "ratio"


def pause(play_in, rounds):
    """The longest a write took while the partner's daemon was killed."""
    longest = []
    with Playground(play_in, "2G") as play:
        for _ in range(rounds):
            job = play.fio("--rw=randwrite", "--bs=4k", "--iodepth=1", "--size=64M", "--time_based",
                           "--runtime=3", wait=False)
            time.sleep(1.5)
            play.run("playground", "kill", "n2")
            longest.append(finish(job)["write"]["clat_ns"]["max"] / 1e6)
            play.run("playground", "start", "n2")
            play.wait(lambda status: status is not None and status["verdict"] == "healthy")
    yield "longest write when the partner is killed", statistics.median(longest), "ms"
    yield "the worst of all", max(longest), "ms"


def resync(play_in, rounds):
    """The partner is away while scattered pieces are written."""
    moved, seconds = [], []
    written = 64 << 20
    with Playground(play_in, "4G") as play:
        play.fio("--rw=write", "--bs=1m", "--iodepth=8", "--size=1G")
        for index in range(rounds):
            play.run("playground", "kill", "n2")
            play.fio("--rw=randwrite", "--bs=64k", "--iodepth=8", "--size=1G", f"--io_size={written}",
                     f"--randseed={index + 7}")
            play.run("playground", "start", "n2")
            began = time.monotonic()
            most = 0

            def watch(status):
                nonlocal most
                if status is None:
                    return False
                for device in status["devices"]:
                    if device["name"] == DEVICE:
                        most = max([most, *(resync["moved_bytes"] for resync in device["resyncs"])])
                return status["verdict"] == "healthy"

            play.wait(watch)
            seconds.append(time.monotonic() - began)
            moved.append(most / written)
    yield "bytes moved beside bytes that differed (as last seen)", statistics.median(moved), "ratio"
    yield "64 MiB of 1 GiB differed: start to in sync", statistics.median(seconds), "s"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--dir", required=True)
    parser.add_argument("what", nargs="+", choices=["intents", "pause", "resync"])
    arguments = parser.parse_args()
    measurements = {"intents": intents, "pause": pause, "resync": resync}
    table = []
    for name in arguments.what:
        for result, value, unit in measurements[name](arguments.dir, arguments.rounds):
            print(json.dumps({"bench": name, "result": result, "value": value, "unit": unit}), flush=True)
            table.append((result, value, unit))
    width = max(len(result) for result, _, _ in table)
    for result, value, unit in table:
        number = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        print(f"{result:<{width}}  {number:>12} {unit}")


main()
