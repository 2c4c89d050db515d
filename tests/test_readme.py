"""Every command of README.md, as it stands there and in its order, in a fresh copy of what git tracks (without git: of the scripts)."""
import re
import shlex
import subprocess
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import torch.distributed.run

from runs import REPO, TINY, Run, free_port, group, write
from trials.diloco_nodes import TINY as WORKER

NOT_RUN = {'pip': 'needs a network; these tests run in what it installs', 'pytest': 'runs this', 'curl': 'needs a network'}
# Before the arguments of README, which win over these, as these win over a config file.
SMALL = {'train.py': [arg for arg in TINY if 'pattern' not in arg], 'train_diloco.py': WORKER, 'sample.py': ['--device=cpu'],
         'prepare.py': '--val_fraction=0.1 --tokenizer=bytes --num_proc=1'.split(), 'block.py': [],
         'eval.py': '--device=cpu --task_data=tasks --contexts=16,32 --blocks=2 --block_tokens=8 --needle_lengths=150 '
                    '--needle_seeds=2 --lengths=32 --repetitions=1'.split()}
HERE = {'nnodes=[0-9:]+': 'nnodes=1', r'nproc_per_node=\d+': 'nproc_per_node=1', r'\$RANK': '0', r'\$MASTER_IP|HOST': '127.0.0.1'}
FILES = {'Skylion007/openwebtext/a.jsonl': b'{"text": "What the hub has, under the same name."}\n' * 999,
         'input.txt': b'What curl would get.\n' * 999, 'tasks/boolq.jsonl': b'{"passage": "It is.", "question": "is it", "label": 1}'}


def commands(folder):
    """The words of each; a block of Python is one. In a sentence, code with a blank in it is a command."""
    first = lambda match: '`%s`' % (folder / match[1]).read_text().partition('\n')[0].lstrip('# ')
    text = re.sub('the first line of `(.*?)`', first, (folder / 'README.md').read_text())
    for language, block, code in re.findall(r'```(\w*)\n(.*?)```|`([^`]+)`', text, re.S):
        assert language in ('', 'sh', 'python', 'bibtex'), f'a block of {language}'
        if language == 'python':  # where safetensors is missing, the lines that need it are not run
            write(folder / 'block.py', block if find_spec('safetensors') else block.partition('from safetensors')[0])
            yield ['python', 'block.py']
        for line in (block if language == 'sh' else code if ' ' in code else '').replace('\\\n', '').splitlines():
            yield from (part.split('\0') for part in '\0'.join(shlex.split(line, comments=True)).split('\0&&\0'))


def test_every_command_in_its_order(tmp_path):
    tracked = subprocess.run('git ls-files', shell=True, cwd=REPO, capture_output=True, text=True).stdout.splitlines()
    names = tracked or ['README.md', *glob('*.py', root_dir=REPO), *glob('config/*.py', root_dir=REPO)]
    for name, data in ({name: Path(REPO, name).read_bytes() for name in names} | FILES).items():
        write(tmp_path / name, data)
    env = {'HF_HOME': f'{tmp_path}/hf', 'HF_HUB_OFFLINE': '1'}
    for n, words in enumerate(commands(tmp_path), 1):
        env |= dict(word.split('=') for word in words if re.match('[A-Z_]+=', word))
        program, *args = [word for word in words if not re.match('[A-Z_]+=', word)]
        if program in NOT_RUN:
            continue
        assert program in ('python', 'torchrun'), words
        i = next(i for i, arg in enumerate(args) if arg.endswith('.py'))
        script, options, ranks = args[i], args[:i], [{}]
        for pattern, here in {**HERE, '29500': str(free_port())}.items():
            options = [re.sub(pattern, here, option) for option in options]
        # each may do more than those before it: one that goes on with an earlier run has something to do
        budget = {'train.py': [f'--max_iters={n}'], 'train_diloco.py': [f'--max_rounds={n}']}.get(script, [])
        args = [str(tmp_path / script), *SMALL[script], *budget, *args[i + 1:]]
        if '--rdzv_backend=c10d' in options:  # one node of one process
            args = [torch.distributed.run.__file__, *options, *args]
        elif program == 'torchrun':  # what it does for two processes, without its start-up time
            torch.distributed.run.parse_args([*options, *args])
            ranks = group(2)
        for run in [Run(tmp_path, args[0], args[1:], env=env | rank) for rank in ranks]:
            assert run.wait().code == 0 and 'finished:' not in run.out, (words, run.code, run.out, run.err)
    written = re.findall(r'\w+\.(?:csv|json)\b', (tmp_path / 'README.md').read_text().partition('## Results')[2])
    assert written and {*written} <= {path.name for path in (tmp_path / 'out/eval').iterdir()}
