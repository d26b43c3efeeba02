"""Two nodes on this machine, on files."""

import json
import os
import subprocess
import tempfile
import time

DEVICE = "n1-d1"


class Playground:
    """`mirrorctl playground`, for as long as the block lasts."""

    def __init__(self, parent, size, *options, programs="", environment=None):
        self.parent, self.size, self.options = parent, size, options
        self.mirrorctl = os.path.join(programs, "mirrorctl")
        self.environment = {**os.environ, **(environment or {})}

    def __enter__(self):
        self.dir = tempfile.TemporaryDirectory(dir=self.parent, prefix="p-")
        self.play = os.path.join(self.dir.name, "play")
        self.process = subprocess.Popen(
            [self.mirrorctl, "playground", "--json", "--frontend", "nbd", "--nodes", "2",
             "--disk-size", self.size, "--dir", self.play, *self.options],
            stdout=subprocess.PIPE, env=self.environment)
        self.wait(lambda status: status is not None and status["verdict"] == "healthy")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.dir.cleanup()

    def run(self, *arguments):
        return subprocess.run([self.mirrorctl, *arguments, "--dir", self.play], capture_output=True, text=True)

    def status(self):
        answer = self.run("status", "--json")
        return json.loads(answer.stdout) if answer.returncode <= 2 and answer.stdout else None

    def wait(self, well, patience=60.0):
        end = time.monotonic() + patience
        while time.monotonic() < end:
            status = self.status()
            if well(status):
                return status
            if self.process.poll() is not None:
                raise SystemExit("scripts/bench: the playground has ended")
            time.sleep(0.05)
        raise SystemExit(f"scripts/bench: not reached within {patience:.0f} s: {self.status()}")

    def device(self):
        return next(device for device in self.status()["devices"] if device["name"] == DEVICE)

    def pids(self):
        """Of the two daemons, n1's first."""
        with open(os.path.join(self.play, "playground.json"), encoding="utf-8") as file:
            marks = json.load(file)["processes"]
        return [mark["pid"] for name in ("n1", "n2") for mark in marks if mark["name"] == name]

    def fio(self, *options, wait=True):
        command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={self.device()['uri']}",
                   "--output-format=json", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return finish(process) if wait else process


def finish(process):
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit("scripts/bench: fio failed")
    return json.loads(output[output.index("{"):])["jobs"][0]
