"""A real rsyslogd with monitoring/logs/rsyslog.conf, which reads one folder and sends to one port."""

from __future__ import annotations

import subprocess
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "monitoring" / "logs" / "rsyslog.conf"


class Rsyslog:
    def __init__(self, folder: Path, logs: Path, port: int) -> None:
        """`folder`: for its own files."""
        self._folder = folder
        spool = folder / "spool"
        spool.mkdir(exist_ok=True)
        text = CONFIG.read_text()
        for theirs, ours in {
            "/var/spool/rsyslog-tidewright": str(spool),
            "/var/log/tidewright": str(logs),
            'serverport="9200"': f'serverport="{port}"',
        }.items():
            assert theirs in text
            text = text.replace(theirs, ours)
        self._config = folder / "rsyslog.conf"
        self._config.write_text(text)

    def check(self) -> subprocess.CompletedProcess[str]:
        command = ["rsyslogd", "-N1", "-f", str(self._config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def __enter__(self) -> Rsyslog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        pid_file = self._folder / "pid"
        pid_file.unlink(missing_ok=True)
        command = ["rsyslogd", "-n", "-f", str(self._config), "-i", str(pid_file)]
        with open(self._folder / "rsyslog.err", "ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
