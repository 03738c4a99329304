"""The command line of `cromss doctor` and launch/doctor.py, and what they print.

Layer 4.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cromss_dist.config import RunConfig
from cromss_dist.doctor.finding import Finding, failed
from cromss_dist.doctor.node import Report
from cromss_dist.doctor.subject import Subject
from cromss_dist.errors import ConfigError
from cromss_dist.parse import ParsedRun, parse_run

DESCRIPTION = """Examines this machine for a run: versions, GPUs, collectives, ports, the file system of the folder of runs, data,
MLflow, Ray's token. Takes what launch/pretrain.py takes (--config FILE, --cluster FILE, --output DIR, dotted keys), and --json.
Starts no run, and leaves nothing. Exits with 1 if a check fails; each failure says how it is mended."""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    parsed: ParsedRun[RunConfig]
    subject: Subject
    as_json: bool


def parse_request(argv: Sequence[str], prog: str, description: str = DESCRIPTION) -> Request:
    """Parses arguments, without the program's name.

    Raises:
        ConfigError: see `parse_run`; or a flag that only a run has.
    """
    arguments = [argument for argument in argv if argument != "--json"]
    parsed = parse_run(arguments, prog=prog, description=description, clusters=True)
    flags = {"dry-run": parsed.dry_run, "fresh": parsed.fresh, "profile": parsed.profile, "detach": parsed.detach}
    if given := [f"--{name}" for name, is_set in flags.items() if is_set]:
        raise ConfigError(f"{', '.join(given)} has no meaning for {prog}, which starts no run; leave it out.")
    has_data = any(argument.startswith(("--config", "--resume", "--data")) for argument in arguments)
    return Request(parsed, Subject.of(parsed.config, parsed.cluster, has_data), len(arguments) < len(argv))


def print_reports(reports: Sequence[Report], as_json: bool) -> int:
    """Prints what was found, a row for each check and, where they differ, for its machines.

    Returns:
        The exit code: 1 if any check failed.
    """
    bad = any(failed(report.findings) for report in reports)
    if as_json:
        print(json.dumps({"failed": bad, "reports": [report.to_dict() for report in reports]}, indent=2))
        return int(bad)
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width
    several = len(reports) > 1
    table = Table("check", *(["machines"] if several else []), "", "found", "what to do", title_justify="left")
    for check, nodes, finding in rows(reports):
        level = Text(finding.level, style=_COLOURS[finding.level])
        table.add_row(check, *([Text(nodes)] if several else []), level, Text(finding.found), Text(finding.fix))
    console.print(table)
    levels = [finding.level for report in reports for finding in report.findings]
    console.print(f"{levels.count('fail')} failed, {levels.count('warn')} to look at, {levels.count('ok')} ok", highlight=False)
    return int(bad)


def rows(reports: Sequence[Report]) -> list[tuple[str, str, Finding]]:
    """Check, machines and finding of each row: machines for which all is well share one, as do those that say the same."""
    grouped: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    num_of: Counter[str] = Counter()
    for report in reports:
        for finding in report.findings:
            what = "" if finding.level == "ok" else finding.level + finding.found
            grouped.setdefault((finding.check, what), []).append((report.node, finding))
            num_of[finding.check] += 1
    order = list(num_of)
    found = []
    for (check, _), members in sorted(grouped.items(), key=lambda item: order.index(item[0][0])):  # stable
        nodes, (last, finding) = [node for node, _ in members], members[-1]
        if len({member.found for _, member in members}) > 1:  # one stands for all
            finding = replace(finding, found=f"{last.split()[0]}: {finding.found}")
        found.append((check, f"all {len(nodes)}" if 1 < len(nodes) == num_of[check] else ", ".join(nodes), finding))
    return found
