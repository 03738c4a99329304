"""What a cluster that `launch.node` started says to someone without its token, at every port that it listens at.

docs/operations.md has the table that `pytest -s` prints here.
"""

import re
import time
from collections import Counter

import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.hosts import Hosts
from tests.cluster.knock import HEALTH, answers, knock, listeners

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HEAD_ONLY = {("127.0.0.1", "dashboard"), ("*", "gcs_server")}
EACH_HOST = {
    ("*", "raylet"),
    ("*", "ray::DashboardAgent"),
    ("127.0.0.1", "ray::DashboardAgent"),
    ("host", "ray::DashboardAgent"),
    ("host", "ray::RuntimeEnvAgent"),
}
# Whether a process is well, the empty page of the dashboard, and what is no call at all: nothing to read, nothing to change.
HARMLESS = re.compile(
    r"(GET (/|/api/gcs_healthz|/api/healthz|/api/local_raylet_healthz) 200)"
    r"|((GET|POST|DELETE) \S+ (404|405))"
    rf"|({HEALTH} OK)|(\S+ UNIMPLEMENTED)"
)
REFUSED = re.compile(r".* (401|UNAUTHENTICATED)")


@pytest.fixture
def cluster_with_dashboard(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Both hosts, the head with a dashboard on loopback."""
    made = Cluster(hosts, tmp_path_factory.mktemp("ports") / "cluster")
    made.start_head("--dashboard", "127.0.0.1:8265")
    made.join(hosts[1])
    time.sleep(10)  # its agents listen last
    return made


def test_no_port_lets_anyone_in_without_the_token(cluster_with_dashboard: Cluster) -> None:
    head, other = cluster_with_dashboard.hosts
    for host in (head, other):
        found = listeners(host)
        places = {(re.sub(re.escape(host.address), "host", entry.address), entry.process) for entry in found}
        assert places == EACH_HOST | (HEAD_ONLY if host is head else set()), "a port of which docs say nothing"
        told = knock(host, [(host.address if entry.address == "*" else entry.address, entry.port) for entry in found])
        for entry, (place, lines) in zip(found, told.items(), strict=True):
            open_calls = [line for line in lines if not REFUSED.fullmatch(line)]
            assert not [line for line in open_calls if not HARMLESS.fullmatch(line)], place
            assert len(open_calls) < len(lines), f"{place} refused nothing, so nothing was shown"
            counts = Counter(line.rpartition(" ")[2] for line in lines)
            print(f"| {place} | {entry.address} | {entry.process} | {dict(counts)} |")


def test_the_dashboard_is_not_there_for_other_hosts(cluster_with_dashboard: Cluster) -> None:
    head, _ = cluster_with_dashboard.hosts
    assert answers(head.address, 8265) == ["closed"]
