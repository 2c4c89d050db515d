"""Which promise is proved where. One of them alone: `pytest tests/test_train.py -k resume`.

| promise | file | -k |
|---|---|---|
| FFT, products, ring buffer and direct sum are one filter; chunks and the recurrence are one GLA | test_model.py | fir, gla |
| prefill, steps and forward agree; a row does not depend on its batch; no output sees a later input | test_model.py | |
| a checkpoint is whole or not there: kills, flips, truncations; nothing that is loaded is executed | test_checkpoint.py | |
| N steps + kill + resume + N steps = 2N steps, on one rank and on two; signals save | test_train.py | resume, stop |
| budgets, bad input, full disks, lost ranks, two runs in one folder: one line | test_train.py | |
| rounds, ledger, elasticity, S3; nothing from the network is unpickled | test_diloco.py | |
| odd texts, what is left out, batches without replacement | test_prepare.py | |
| streaming, stops, long prompts | test_sample.py | |
| knobs, hints, the lock, the atomic write | test_configurator.py | |
| every suite against a plain adapter or a direct computation | test_eval.py | |
| every command of README.md, in its order, on small data | test_readme.py | |
"""
import os
import shutil
import signal
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would all we start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI nothing that CI has may be missing: a test skips only what the machine forbids, such as a mount."""
    report = yield
    if report.skipped and os.environ.get('CI') and not hasattr(report, 'wasxfail'):
        if 'could not import' in (reason := str(report.longrepr)):
            report.outcome, report.longrepr = 'failed', f'skipped in CI, where it must run: {reason}'
    return report


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    from runs import make_data
    return '--dataset=' + make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='session')
def shared():
    """Where a file or folder of ../shared/data is. Where that is at hand, nothing in it may be missing."""
    if not os.path.isdir(folder := os.path.join(ROOT, '..', 'shared', 'data')):
        pytest.skip('../shared/data is not at hand')
    return lambda *names: os.path.join(folder, *names)


@pytest.fixture(scope='session')
def gpt2(shared, tmp_path_factory):
    """GPT-2's tokenizer without a network: tiktoken reads its cache, and deletes what it doesn't like: a copy."""
    pytest.importorskip('tiktoken')
    from prepare import get_tokenizer
    cache = tmp_path_factory.mktemp('tiktoken')
    shutil.copyfile(shared('tokenizer', 'vocab.bpe'), cache / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee')
    shutil.copyfile(shared('tokenizer', 'encoder.json'), cache / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
        yield get_tokenizer('gpt2')
