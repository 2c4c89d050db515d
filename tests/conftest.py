import os
import signal
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault('TRITON_INTERPRET', str(int(not torch.cuda.is_available())))  # Triton's kernels on a CPU, read at import
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would all we start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI nothing that CI has may be missing: a test skips only what the machine forbids, such as a mount."""
    report = yield
    if report.skipped and os.environ.get('CI') and not hasattr(report, 'wasxfail'):
        reason = str(report.longrepr)
        data = 'shared/data' in reason and os.path.isdir(os.path.join(ROOT, '..', 'shared', 'data'))
        if data or 'could not import' in reason:
            report.outcome, report.longrepr = 'failed', f'skipped in CI, where it must run: {reason}'
    return report
