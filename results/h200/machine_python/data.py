"""
All Python sources of this machine as bytes, data/machine_python, split by package: those held out are not in training, nor
carried inside another package (at most a quarter of their longer lines are found anywhere else).

    python results/h200/machine_python/data.py
"""

import hashlib
import json
import os
import sys
import sysconfig

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(HERE))))
import prepare  # noqa: E402

LARGEST, HELD_OUT, OVERLAP = 1_200_000, 5_000_000, 0.25  # bytes of a held-out package and of all of them; share of lines


def lines(text):
    return {hash(line) for line in map(bytes.strip, text.split(b'\n')) if len(line) >= 30}


packages, seen = {}, set()
for root in {p for p in [*sys.path, *sysconfig.get_paths().values()] if os.path.isdir(p) and 'python' in p}:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(d for d in folders if d[0] != '.' and d != '__pycache__' and not d.endswith('-packages'))
        for name in sorted(n for n in names if n.endswith('.py')):
            path = os.path.join(folder, name)
            with open(path, 'rb') as file:
                text = file.read(1 << 20)
            digest = hashlib.sha256(text).digest()
            generated = len(text) == 1 << 20 or b'generated' in text[:300].lower()
            if text and b'\0' not in text and digest not in seen and not generated:
                package = os.path.relpath(path, root).split(os.sep)[0].removesuffix('.py')
                packages.setdefault(package, []).append(text)
                seen.add(digest)
sizes = {name: sum(map(len, texts)) for name, texts in packages.items()}
order = sorted((name for name in sizes if sizes[name] <= LARGEST), key=lambda name: hashlib.sha256(name.encode()).digest())
candidates = {name: set().union(*map(lines, packages[name])) for name in order[:120]}
wanted, elsewhere = set().union(*candidates.values()), {}  # line -> the packages that have it
for name, texts in packages.items():
    for line in set().union(*map(lines, texts)) & wanted:
        elsewhere.setdefault(line, []).append(name)
held, overlap = [], {}
for name, own in candidates.items():
    share = sum(len(elsewhere[line]) > 1 for line in own) / max(1, len(own))
    if own and share <= OVERLAP and sum(sizes[n] for n in held) + sizes[name] <= HELD_OUT:
        held.append(name)
        overlap[name] = round(share, 3)
splits = {'train': sorted(packages.keys() - set(held)), 'val': sorted(held)}
prepare._source = lambda config: ({split: ([(text, True)] for name in names for text in packages[name])
                                   for split, names in splits.items()}, sum(sizes.values()))
meta = prepare.make({'dataset': 'machine_python', 'roots': 'machine_python', 'num_proc': 1})
largest = sorted(splits['train'], key=sizes.get, reverse=True)[:40]
with open(os.path.join(HERE, 'data.json'), 'w') as file:
    json.dump({'python': sys.version.split()[0], 'splits': meta['splits'], 'packages': {k: len(v) for k, v in splits.items()},
               'held_out': {n: {'bytes': sizes[n], 'lines_elsewhere': overlap[n]} for n in sorted(held)},
               'largest_in_training': {n: sizes[n] for n in largest}}, file, indent=1)
print(json.dumps(meta['splits'], indent=1))
