"""A whole soak: the cluster, mixed traffic, kills, and what was promised."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from loadtests import driver, figures, preflight, resources
from loadtests.driver import Fleet
from loadtests.options import Options
from loadtests.resources import Watch
from loadtests.session import WARM_UP, finish
from loadtests.soak import cluster as clusters
from loadtests.soak.cluster import NUM_REPLICAS
from loadtests.soak.kills import Killer, Schedule
from loadtests.soak.probe import Probe
from loadtests.soak.verdict import verdict
from tidewright.bench import machine


def run(options: Options, pause: float, folder: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """`pause`: seconds between a recovery and the next kill, on average; 0: none. `more`: flags of `tidewright serve`.

    Raises:
        TargetError, ServerError, LoadError: it could not run; the message says why.
    """
    print(f"Starting a gateway and {NUM_REPLICAS} replicas.", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with clusters.running(folder, more) as cluster:
        options = preflight.check(msgspec.structs.replace(options, url=cluster.url))
        print(f"{options.users} users, {options.duration:.0f} s; Ctrl-C stops and reports.", file=sys.stderr)
        killer = Killer(cluster, Schedule(options.seed, pause, NUM_REPLICAS), lambda text: print(text, file=sys.stderr))
        roots = [*cluster.roots(), resources.own_family()]
        with Watch(lambda: roots) as watch, Probe(options.url, options.model, options.keys[0]) as probe:
            if pause:
                killer.start()
            try:
                result = driver.run(options, Fleet(), folder)
            finally:
                if pause:
                    killer.stop()
    kills = [{**asdict(kill), "at": kill.at - result.began} for kill in killer.kills]
    made = figures.report(
        result.samples,
        options,
        result.began,
        result.ended,
        interrupted=result.interrupted,
        stopped=result.stopped(options),
        machine=machine.description(),
        processes=resources.figures(watch.series, result.began, min(WARM_UP, options.duration / 3)),
        kills=kills,
        probes={"asked": probe.asked, "answered": probe.answered, "causes": probe.causes},
    )
    made["verdict"] = verdict(made, probe.availability)
    finish(made, folder)
    return made
