"""A real rsyslogd."""

from benchmarks.rsyslog import Rsyslog
from helpers.needs import needs


@needs("rsyslog")
class RunningRsyslog(Rsyslog):
    pass
