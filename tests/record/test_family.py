from __future__ import annotations

import subprocess
import sys
import time

import pytest

from silotune.record.family import Family

BUSY = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"


def test_a_helper_counts_while_it_runs_and_keeps_what_it_spent() -> None:
    family = Family()
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as helper:  # noqa: S603
        family.join(helper.pid)
        assert helper.stdout is not None
        helper.stdout.readline()
        own, both = time.process_time(), family.cpu_seconds()
        assert 0.5 <= both - own < 5
        assert family.helpers_high_water_bytes() > 1e6
        family.restart_high_water()
        family.leave(helper.pid)
        helper.kill()
    assert family.cpu_seconds() - time.process_time() == pytest.approx(both - own, abs=0.1)
    assert family.helpers_high_water_bytes() == 0


def test_a_helper_that_died_unseen_is_no_error() -> None:
    family = Family()
    family.join(2**22 - 1)
    assert family.cpu_seconds() == pytest.approx(time.process_time(), abs=0.1)
    assert family.helpers_high_water_bytes() == 0
