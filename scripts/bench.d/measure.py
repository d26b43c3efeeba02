"""The measurements of scripts/bench."""

import argparse
import contextlib
import json
import os
import statistics
import time

from compare import JOBS, SYSTEMS, compare, table as compare_table
from loopback import copy_file
from playground import DEVICE, Playground, finish
from rivals import make_image


def intents(play_in, rounds):
    """A cold region needs its dirty bit on the disk first, a warm one has it there. What a warm one costs is told by two
    clusters that live at the same time, with and without intents, of one build: what a disk does changes from
    one minute to the next."""
    job = ["--rw=randwrite", "--bs=4k", "--blockalign=1m", "--iodepth=32", "--randseed=1"]
    cold, warm = [], []
    for _ in range(rounds):
        with Playground(play_in, "14G") as play:
            cold.append(play.fio(*job, "--size=6G")["write"]["iops"])
            play.fio(*job, "--size=6G", "--time_based", "--runtime=1")
            again = play.fio(*job, "--size=6G", "--time_based", "--runtime=6", "--randrepeat=0")
            warm.append(again["write"]["iops"])
    yield "4k random writes, QD32, every region new", statistics.median(cold), "IOPS"
    yield "the same again", statistics.median(warm), "IOPS"
    yield "cold beside warm", statistics.median(a / b for a, b in zip(cold, warm)), "ratio"
    job = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=1G", "--randrepeat=0", "--time_based"]
    results = {"": [], "dirty-skipped": []}
    with contextlib.ExitStack() as stack:
        plays = {}
        for mistake in results:
            environment = {"UBLK_MIRROR_PLANTED": mistake}
            play = Playground(play_in, "3G", programs="target/planted/release", environment=environment)
            plays[mistake] = stack.enter_context(play)
            plays[mistake].fio("--rw=write", "--bs=1m", "--iodepth=8", "--size=1G")
        for index in range(4 * rounds):
            # Whoever goes first finds another machine than who goes second.
            for mistake in results if index % 2 == 0 else reversed(results):
                plays[mistake].fio(*job, "--runtime=1")
                results[mistake].append(plays[mistake].fio(*job, "--runtime=3")["write"]["iops"])
    yield "4k random writes, QD32, warm", statistics.median(results[""]), "IOPS"
    yield "the same without intents", statistics.median(results["dirty-skipped"]), "IOPS"
    ratios = [a / b for a, b in zip(*results.values())]
    yield "warm, with beside without intents", statistics.median(ratios), "ratio"
    yield "the same, the middle half from", statistics.quantiles(ratios)[0], "ratio"
    yield "and to", statistics.quantiles(ratios)[2], "ratio"


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


def resync_speed(play_in, rounds):
    """All of 1 GiB differs: how quickly it is made equal, beside a copy by hand over the same link."""
    size = 1 << 30
    ours, raw = [], []
    with Playground(play_in, "4G") as play:
        files = [os.path.join(play.dir.name, name) for name in ("from", "to")]
        for file in files:
            make_image(file, size)
        play.fio("--rw=write", "--bs=1m", "--iodepth=8", f"--size={size}")
        for index in range(rounds):
            play.run("playground", "kill", "n2")
            # Different data each time, so that no comparison spares the copy.
            play.fio("--rw=write", "--bs=1m", "--iodepth=8", f"--size={size}", f"--randseed={index + 70}",
                     "--refill_buffers")
            raw.append(copy_file(*files, size))
            play.run("playground", "start", "n2")
            seen = []

            def watch(status):
                for device in status["devices"] if status else []:
                    for resync in device["resyncs"]:
                        if device["name"] == DEVICE and resync["moved_bytes"] > 0:
                            seen.append((time.monotonic(), resync["moved_bytes"]))
                return status is not None and status["verdict"] == "healthy"

            play.wait(watch)
            (began, before), (ended, after) = seen[0], seen[-1]
            ours.append((after - before) / (ended - began) / (1 << 20))
    yield "a copy by hand", statistics.median(raw), "MiB/s"
    yield "resync of what differs everywhere", statistics.median(ours), "MiB/s"
    yield "resync beside a copy by hand", statistics.median(a / b for a, b in zip(ours, raw)), "ratio"


def listed(known):
    """A type of argument: names of `known`, separated by commas."""
    def parse(text):
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no such thing as {unknown[0]}: take from {', '.join(known)}")
        return names
    return parse


def main():
    measurements = {"intents": intents, "pause": pause, "resync": resync, "resync-speed": resync_speed}
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--media", type=listed(SYSTEMS), required=True)
    parser.add_argument("--jobs", type=listed(JOBS), required=True)
    parser.add_argument("--before", default="")
    parser.add_argument("what", nargs="+", choices=["compare", *measurements])
    arguments = parser.parse_args()
    table, compared = [], []
    for name in arguments.what:
        if name == "compare":
            compared = compare(arguments)
            continue
        for result, value, unit in measurements[name](arguments.dir, arguments.rounds):
            print(json.dumps({"bench": name, "result": result, "value": value, "unit": unit}), flush=True)
            table.append((result, value, unit))
    if compared:
        print("\n".join(compare_table(compared)))
    width = max((len(result) for result, _, _ in table), default=0)
    for result, value, unit in table:
        number = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        print(f"{result:<{width}}  {number:>12} {unit}")


main()
