"""The harness itself: a check that cannot fail would prove nothing about the mount."""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kafkarun import distribution
from kafkarun.broker import Broker
from kafkarun.check import Ledger, PartitionCheck, Report
from kafkarun.distribution import Distribution
from kafkarun.errors import KafkaRunError
from kafkarun.payload import Payloads

from kafka.logdirs import MTIME_SKEW_MAX_NS, differences, snapshot

PAYLOADS = Payloads(seed=1, size=200)
FAKE_MAVEN = """\
#!/bin/sh
for option; do case $option in -DoutputDirectory=*) output=${option#*=};; esac; done
echo run >> "$MAVEN_RUNS"
printf jar > "$output/kafka_2.13-9.9.9.jar"
"""
FAILING_MAVEN = """\
#!/bin/sh
echo '[INFO] Downloading'
echo '[ERROR] Could not resolve dependencies: no route to host'
echo '[ERROR] Re-run Maven using the -X switch'
exit 1
"""


def check_of(*records: tuple[int, bytes], acked: int) -> Report:
    """What the check says of these (offset, record) if seq 0… were acked at offset 0…"""
    check = PartitionCheck(0, {seq: seq for seq in range(acked)}, PAYLOADS)
    for offset, record in records:
        check.see(offset, record)
    return check.report()


def records(*seqs: int) -> list[tuple[int, bytes]]:
    return [(offset, PAYLOADS.make(0, seq)) for offset, seq in enumerate(seqs)]


def test_check_passes_what_was_acked_and_consumed_in_order() -> None:
    assert check_of(*records(0, 1, 2), acked=3) == Report(acked=3, consumed=3)


def test_check_counts_an_acked_record_that_is_not_there_as_lost() -> None:
    report = check_of(*records(0, 1), acked=3)
    assert report.lost == 1
    assert not report.intact
    assert report.unacked == 0


def test_check_counts_a_second_copy_as_duplicated() -> None:
    report = check_of(*records(0, 1, 1), acked=2)
    assert (report.duplicated, report.unacked) == (1, 0)


def test_check_counts_a_record_after_a_later_one_as_reordered_and_misplaced() -> None:
    report = check_of(*records(1, 0), acked=2)
    assert (report.reordered, report.misplaced) == (1, 2)


def test_check_counts_records_without_an_ack_but_finds_nothing_wrong_with_them() -> None:
    report = check_of(*records(0, 1, 2), acked=2)
    assert report.intact
    assert report.unacked == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record[:-1],
        lambda record: record[:100] + bytes([record[100] ^ 1]) + record[101:],
        lambda record: record[:100] + bytes(100),
        lambda record: Payloads(seed=2, size=200).make(0, 0),
        lambda record: PAYLOADS.make(1, 0),
    ],
    ids=["short", "flipped bit", "zero tail", "another run's", "another partition's"],
)
def test_check_counts_a_damaged_or_foreign_record_as_corrupt(
    damage: Callable[[bytes], bytes],
) -> None:
    report = check_of((0, damage(PAYLOADS.make(0, 0))), acked=1)
    assert (report.corrupt, report.lost) == (1, 1)


def test_ledger_keeps_only_what_lies_behind_the_log_starts() -> None:
    ledger = Ledger()
    for seq in range(10):
        ledger.add(seq % 2, seq, offset=seq)
    assert len(ledger.retained({0: 4, 1: 100})) == 3


def test_snapshots_differ_in_bytes_size_mode_time_and_presence(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for top in (before, after):
        top.mkdir()
        for name in ("same", "bytes", "mode", "time"):
            (top / name).write_text("text")
            os.utime(top / name, ns=(0, 0))
    (before / "gone").touch()
    (after / "bytes").write_text("TEXT")
    os.utime(after / "bytes", ns=(0, 0))
    (after / "mode").chmod(stat.S_IRUSR)
    os.utime(after / "time", ns=(0, 2 * MTIME_SKEW_MAX_NS))
    found = differences(snapshot(before), snapshot(after))
    assert [line.split(" ")[:2] for line in found] == [
        ["gone:", "not"],
        ["bytes:", "digest"],
        ["mode:", "mode"],
        ["time:", "mtime_ns"],
    ]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """An otherwise bare PATH into which a test puts its own programs."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("MAVEN_RUNS", str(tmp_path / "runs"))

    def install(name: str, script: str = "#!/bin/sh\n") -> None:
        program = directory / name
        program.write_text(script)
        program.chmod(0o755)

    return install


@pytest.mark.parametrize(("present", "missing"), [((), "java"), (("java",), "mvn")])
def test_fetch_names_the_program_that_is_missing(
    tools: Callable[..., None], tmp_path: Path, present: tuple[str, ...], missing: str
) -> None:
    for name in present:
        tools(name)
    with pytest.raises(KafkaRunError, match=rf"^{missing} not found: apt-get install \S+$"):
        distribution.fetch("9.9.9", tmp_path / "cache")


def test_fetch_reports_the_first_error_of_maven_in_one_line(
    tools: Callable[..., None], tmp_path: Path
) -> None:
    tools("java")
    tools("mvn", FAILING_MAVEN)
    with pytest.raises(KafkaRunError) as caught:
        distribution.fetch("9.9.9", tmp_path / "cache")
    assert str(caught.value) == (
        "could not fetch Kafka 9.9.9 from Maven Central: "
        "[ERROR] Could not resolve dependencies: no route to host"
    )
    assert not (tmp_path / "cache" / "kafka-9.9.9").exists()


def test_fetch_by_several_at_once_downloads_once(
    tools: Callable[..., None], tmp_path: Path
) -> None:
    tools("java")
    tools("mvn", FAKE_MAVEN)
    with ThreadPoolExecutor(8) as pool:
        fetched = list(pool.map(lambda _: distribution.fetch("9.9.9", tmp_path), range(8)))
    assert len(set(fetched)) == 1
    assert (tmp_path / "runs").read_text() == "run\n"


def test_fetch_replaces_a_cached_version_that_has_lost_a_jar(
    tools: Callable[..., None], tmp_path: Path
) -> None:
    tools("java")
    tools("mvn", FAKE_MAVEN)
    first = distribution.fetch("9.9.9", tmp_path)
    jar = first.directory / "kafka_2.13-9.9.9.jar"
    jar.unlink()
    distribution.fetch("9.9.9", tmp_path)
    assert jar.read_text() == "jar"


def test_broker_that_cannot_start_is_reported_with_its_last_words(
    kafka: Distribution, tmp_path: Path
) -> None:
    with Broker(kafka, [tmp_path / "logs"], tmp_path / "work") as broker:
        # Not formatted, so there is no meta.properties.
        with pytest.raises(KafkaRunError, match=r"^broker ended by itself .*meta\.properties"):
            broker.start()
        assert not broker.running
        assert broker.errors()
