"""Where Kafka's jars come from: Maven Central, once per version, kept in the user's cache.

A cached version is a directory whose manifest lists every jar with its size; it appears by
one rename, so a download cut short is never taken for a whole one.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kafkarun.errors import KafkaRunError

MANIFEST = "manifest.json"
_COPY_DEPENDENCIES = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_LOG4J2_VERSION = "2.25.4"
_DOWNLOAD_TIMEOUT_S = 600
_TOOL_TIMEOUT_S = 120

_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>pafkafs</groupId>
  <artifactId>kafka-runtime</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
{dependencies}
  </dependencies>
</project>
"""
_DEPENDENCY = """\
    <dependency>
      <groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version>
    </dependency>"""


@dataclass(frozen=True)
class Distribution:
    """The jars of one Kafka version and the java that runs them."""

    version: str
    directory: Path
    java: str

    @property
    def uses_log4j2(self) -> bool:
        """Kafka 4 logs through log4j 2; Kafka 3 brings reload4j, a log4j 1."""
        return int(self.version.split(".")[0]) >= 4

    def command(self, main_class: str, *arguments: str, jvm: Sequence[str] = ()) -> list[str]:
        return [self.java, *jvm, "-cp", f"{self.directory}/*", main_class, *arguments]

    def run_tool(self, main_class: str, *arguments: str) -> str:
        """Run one of Kafka's command line tools to its end and return what it printed."""
        # A tool lives for a second: compiling its code well would take longer than it runs.
        jvm = ("-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
        command = self.command(main_class, *arguments, jvm=jvm)
        tool = main_class.rpartition(".")[2]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S)
        except subprocess.TimeoutExpired as late:
            raise KafkaRunError(f"{tool} took more than {_TOOL_TIMEOUT_S} s") from late
        if done.returncode != 0:
            raise KafkaRunError(f"{tool} failed: {_reason(done.stderr or done.stdout)}")
        return done.stdout


def fetch(version: str, cache: Path | None = None) -> Distribution:
    """Return Kafka `version`, downloading it if the cache does not hold all of it."""
    java = _program("java", "openjdk-17-jre-headless")
    cache = cache or default_cache()
    directory = cache / f"kafka-{version}"
    if not _is_complete(directory):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".kafka-{version}.lock"):
            if not _is_complete(directory):  # another process may have been first
                _download(version, directory)
    return Distribution(version, directory, java)


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pafkafs"


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise KafkaRunError(f"{name} not found: apt-get install {package}")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_complete(directory: Path) -> bool:
    try:
        manifest: dict[str, int] = json.loads((directory / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return manifest == _sizes(directory)


def _sizes(directory: Path) -> dict[str, int]:
    return {jar.name: jar.stat().st_size for jar in directory.glob("*.jar")}


def _download(version: str, directory: Path) -> None:
    """Called with the version's lock held: whatever else lies here is a leftover."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    pom = partial / "pom.xml"
    pom.write_text(_pom(version))
    _run_maven(version, pom, partial)
    sizes = _sizes(partial)
    if f"kafka_2.13-{version}.jar" not in sizes:
        raise KafkaRunError(f"could not fetch Kafka {version}: mvn left no kafka_2.13 jar")
    (partial / MANIFEST).write_text(json.dumps(sizes, indent=1))
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _run_maven(version: str, pom: Path, output: Path) -> None:
    maven = _program("mvn", "maven")
    options = [f"-DoutputDirectory={output}", "-DincludeScope=runtime"]
    command = [maven, "-q", "-B", "-f", str(pom), _COPY_DEPENDENCIES, *options]
    what = f"could not fetch Kafka {version} from Maven Central"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as late:
        raise KafkaRunError(f"{what}: no end within {_DOWNLOAD_TIMEOUT_S} s") from late
    if done.returncode != 0:
        raise KafkaRunError(f"{what}: {_reason(done.stdout or done.stderr)}")


def _pom(version: str) -> str:
    wanted = [("org.apache.kafka", name, version) for name in ("kafka_2.13", "kafka-tools")]
    if not version.startswith("3."):
        # Named here, not left to Kafka's own poms: all three have to be of one version.
        logging = ("log4j-api", "log4j-core", "log4j-slf4j-impl")
        wanted += [("org.apache.logging.log4j", name, _LOG4J2_VERSION) for name in logging]
    entries = (_DEPENDENCY.format(group=g, artifact=a, version=v) for g, a, v in wanted)
    return _POM.format(dependencies="\n".join(entries))


def _reason(output: str) -> str:
    """The line of a tool's output that says most: its first error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "Exception" in line]
    return (errors or lines[-1:] or ["it said nothing"])[0][:300]
