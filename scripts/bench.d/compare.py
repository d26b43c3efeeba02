"""Our mirror beside its floor and its rivals: the same fio jobs, in the same run, in turns."""

import json
import os
import statistics
import subprocess
import tempfile
import time

from loopback import round_trip_us
from playground import Playground
from rivals import Nbdkit, Quorum, Raw, System

SIZE = 1 << 30
RIVAL = Quorum.name

# Name: fio's pattern, block size, depth of each connection, connections.
JOBS = {
    "write-4k-qd1": ("randwrite", "4k", 1, 1),
    "write-4k-qd32": ("randwrite", "4k", 32, 1),
    "write-4k-qd8x4": ("randwrite", "4k", 8, 4),
    "write-128k-qd8": ("write", "128k", 8, 1),
    "read-4k-qd1": ("randread", "4k", 1, 1),
    "read-4k-qd32": ("randread", "4k", 32, 1),
    "read-4k-qd8x4": ("randread", "4k", 8, 4),
    "read-128k-qd8": ("read", "128k", 8, 1),
}
# The unit of each figure, and whether more of it is better.
FIGURES = {
    "iops": ("IOPS", True),
    "mib_s": ("MiB/s", True),
    "p50_us": ("us, median latency", False),
    "p99_us": ("us, 99th percentile", False),
    "cpu_s": ("s of server CPU per 100k", False),
    "switches": ("context switches per I/O", False),
}
# Seconds of each job that are not measured.
RAMP = 1
TICK = os.sysconf("SC_CLK_TCK")


class Ours(System):
    """Two nodes of ours, their device exported over NBD."""

    options = ()

    def __init__(self, place, _size, name="ours", programs=""):
        super().__init__()
        self.name = name
        # The primary segment is 45 % of a disk. All of it is taken from the file system at once: where that is memory, there
        # has to be enough for all systems.
        self.playground = Playground(place, "2400M", "--nbd-tcp", *self.options, programs=programs).__enter__()
        self.uri = self.playground.device()["uri"]
        self.playground.fio("--rw=write", "--bs=1m", "--iodepth=8", f"--size={SIZE}")

    def pids(self):
        return self.playground.pids()

    def stop(self):
        self.playground.__exit__()

    def targets(self):
        return [["--ioengine=nbd", f"--uri={self.uri}"]]


class Deferred(Ours):
    """The same with a mirror that acknowledges from its memory."""

    options = ("--commit", "deferred")

    def __init__(self, place, size):
        super().__init__(place, size, "deferred")


SYSTEMS = {"memory": [Ours, Deferred, Quorum, Nbdkit, Raw], "disk": [Ours, Deferred, Quorum, Raw]}


def cpu_seconds(pids):
    """User and system time of processes, with threads that have ended."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def switches(pids):
    """Context switches of all threads that live."""
    total = 0
    for pid in pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                with open(f"/proc/{pid}/task/{task}/status", encoding="ascii") as file:
                    total += sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
            except FileNotFoundError:
                pass
    return total


def usage(pids):
    return time.monotonic(), cpu_seconds(pids), switches(pids)


def measure(system, job, seconds):
    pattern, block, depth, connections = JOBS[job]
    # The first writes to regions that were idle for seconds wait for their dirty bits; that is for `intents`.
    command = ["fio", "--output-format=json", "--time_based", f"--ramp_time={RAMP}", f"--runtime={seconds}", f"--rw={pattern}",
               f"--bs={block}", f"--iodepth={depth}", f"--numjobs={connections}", f"--size={SIZE}", "--norandommap",
               "--randrepeat=0", "--group_reporting", "--thread"]
    targets = system.targets()
    if pattern in ("randread", "read"):
        # One copy answers a read.
        targets = targets[:1]
    for index, target in enumerate(targets):
        command += [f"--name=target{index}", *target]
    pids = system.pids()
    fio = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # What the servers used is looked at while fio measures, from a little after its beginning.
    time.sleep(RAMP + 0.3)
    before = usage(pids)
    time.sleep(max(0.5, seconds - 0.6))
    used = [(b - a) for a, b in zip(before, usage(pids))]
    output, errors = fio.communicate()
    if fio.returncode != 0:
        raise SystemExit(f"scripts/bench: fio failed on {system.name}: {errors[-500:]}")
    result = json.loads(output[output.index("{"):])["jobs"][0]["read" if "read" in pattern else "write"]
    # Two files that are written at the same time are one mirrored write.
    iops = result["iops"] / len(targets)
    percentile = result["clat_ns"]["percentile"]
    figures = {
        "iops": iops,
        "mib_s": result["bw_bytes"] / len(targets) / (1 << 20),
        "p50_us": percentile["50.000000"] / 1e3,
        "p99_us": percentile["99.000000"] / 1e3,
    }
    if pids:
        figures["cpu_s"] = used[1] / used[0] / iops * 1e5
    if pids and system.lasting_threads:
        figures["switches"] = used[2] / used[0] / iops
    return figures


def in_turns(medium, place, jobs, rounds, seconds, before):
    """Yields every single run."""
    systems = []
    try:
        for kind in SYSTEMS[medium]:
            systems.append(kind(place, SIZE))
        if before:
            systems.append(Ours(place, SIZE, "before", before))
        for number in range(rounds):
            for job in jobs:
                # Whoever is first in one round is last in the next.
                for system in systems if number % 2 == 0 else systems[::-1]:
                    yield {"medium": medium, "job": job, "system": system.name, "round": number,
                           **measure(system, job, seconds)}
            yield {"medium": medium, "job": "link", "system": "loopback", "round": number,
                   "p50_us": round_trip_us()}
    finally:
        for system in systems:
            system.stop()


def compare(arguments):
    """Every run as a JSON line; then the medians and the medians of the ratios within each round."""
    runs = []
    for medium in arguments.media:
        parent = "/dev/shm" if medium == "memory" else arguments.dir
        with tempfile.TemporaryDirectory(dir=parent, prefix="ublk-bench-") as place:
            for run in in_turns(medium, place, arguments.jobs, arguments.rounds, arguments.seconds,
                                arguments.before):
                figures = {key: round(value, 2) if isinstance(value, float) else value for key, value in run.items()}
                print(json.dumps({"bench": "compare", **figures}), flush=True)
                runs.append(run)
    return runs


def table(runs):
    """Lines for people."""
    groups = {}
    for run in runs:
        groups.setdefault((run["medium"], run["job"]), {}).setdefault(run["system"], {})[run["round"]] = run
    for (medium, job), systems in groups.items():
        yield f"\n{medium}, {job}"
        rival = systems.get(RIVAL, {})
        for name, rounds in systems.items():
            cells = [f"  {name:<12}"]
            for figure in FIGURES:
                values = [run[figure] for run in rounds.values() if figure in run]
                if not values:
                    continue
                median = statistics.median(values)
                cell = f"{median:,.0f}" if median >= 1000 else f"{median:.1f}" if median >= 10 else f"{median:.2f}"
                ratios = [run[figure] / rival[number][figure] for number, run in rounds.items()
                          if figure in run and rival.get(number, {}).get(figure)]
                if ratios and name != RIVAL:
                    cell += f" ({statistics.median(ratios):.2f})"
                cells.append(f"{figure} {cell:<16}")
            yield "".join(cells).rstrip()
    yield f"\n(in brackets: the median of the ratios to {RIVAL} of the same round)"
    for figure, (unit, more) in FIGURES.items():
        yield f"{figure}: {unit}; {'more' if more else 'less'} is better"
