"""
All Python sources of this machine as bytes, data/machine_python, split by package. A package that is held out
is not in training, and at most a quarter of its longer lines are found in any other package.

    python results/machine_python/data.py
"""

import hashlib
import json
import os
import sys
import sysconfig

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import prepare  # noqa: E402

LARGEST, HELD_OUT = 1_200_000, 5_000_000  # bytes of a held-out package, and of all of them
OVERLAP = 0.25  # the largest share of a held-out package's lines that others have


def lines(text):
    return {hash(line) for line in map(bytes.strip, text.split(b'\n')) if len(line) >= 30}


packages, seen = {}, set()
roots = {p for p in [*sys.path, *sysconfig.get_paths().values()] if os.path.isdir(p) and 'python' in p}
for root in sorted(roots):
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name[0] != '.' and name != '__pycache__'
                            and not name.endswith('-packages'))
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
small = [name for name in sizes if sizes[name] <= LARGEST]
order = sorted(small, key=lambda name: hashlib.sha256(name.encode()).digest())
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
documents = {split: (text for name in names for text in packages[name]) for split, names in splits.items()}
source = hashlib.sha256(json.dumps([splits, sorted(digest.hex() for digest in seen)]).encode()).hexdigest()
recipe = {'dataset': 'machine_python', 'source': source}
meta = prepare.make_from(documents, 'data/machine_python', 'bytes', recipe)
largest = sorted(splits['train'], key=sizes.get, reverse=True)[:40]
with open(os.path.join(HERE, 'data.json'), 'w') as file:
    json.dump({'python': sys.version.split()[0], 'splits': meta['splits'],
               'packages': {k: len(v) for k, v in splits.items()},
               'held_out': {n: {'bytes': sizes[n], 'lines_elsewhere': overlap[n]} for n in sorted(held)},
               'largest_in_training': {n: sizes[n] for n in largest}}, file, indent=1)
print(json.dumps(meta['splits'], indent=1))
